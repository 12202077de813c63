"""The running gateway: supervisor, follower and worker processes, connections, and what steers them."""
