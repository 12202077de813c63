"""Sockets of devices and of services, driven without a transport of the event loop."""
