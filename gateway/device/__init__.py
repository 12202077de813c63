"""The other end: a device's client on the same TLS-PSK engine."""
