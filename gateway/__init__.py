"""The PSK gateway: TLS-PSK in front, a SQL registry of keys behind, payloads to any backend."""

__version__ = "0.1.0"
