"""Who may come in: limits, the realm and contexts of a listener, the look-up of an identity, and what becomes of a handshake that fails."""
