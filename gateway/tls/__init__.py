"""TLS-PSK without sockets: the OpenSSL binding, cipher-suite profiles, contexts, and the sans-I/O sessions."""
