"""The programs that the supervisor starts, worker and follower, and what every process has: loop, sockets, descriptors, keys, hardening.

Whoever is a process of ours, `gatewayctl` too, imports this before nearly all else, and so the garbage collector is told
here to look seldom: neither loading some 700 modules nor serving connections leaves cycles behind, so looking for some at
every 700 objects, as is Python's default, finds nothing.
"""

import gc

gc.set_threshold(20_000, 50, 50)
