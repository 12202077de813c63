"""Spools: messages that were acknowledged and are not at the backend yet, on disk.

folder.py    which process owns which spool file: claims, proved by flock
store.py     one spool file: SQLite, blocking
outbox.py    a store with its thread, and what of it is in memory
deliverer.py from an outbox to the backend, again and again until it is there
delivery.py  all of that for one route in one process
"""

from gateway.forward.outbox.delivery import SpooledDelivery
from gateway.forward.outbox.store import DeadLetter

__all__ = ["DeadLetter", "SpooledDelivery"]
