"""The programs that the supervisor starts, worker and follower, and what every process has: loop, sockets, descriptors, keys, hardening."""
