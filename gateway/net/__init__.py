"""The event loop, and sockets of devices and of services that are driven without its transports."""
