"""The one tree of errors. The first branch says who is to blame.

    GatewayError
    |-- PeerError            the device (or whoever connected) broke a protocol
    |-- RegistryError        the SQL registry, its replica or its master key
    |   |-- RegistryUnavailable   away, slow or refusing: try again later, nobody is unauthorised because of it
    |   |-- RegistryMismatch      reachable, but its schema or master key does not fit this program
    |   '-- RegistryRefused       the request itself is wrong: unknown name, duplicate, invalid value
    |-- BackendError         where payloads go
    |   |-- BackendUnavailable    away or timed out: sending again may help
    |   '-- BackendRefused        this message will never be taken: sending again does not help
    |-- SpoolError           the spool on the disk of this node
    |   |-- SpoolFull             the disk is full: nothing was changed, and later there may be room
    |   '-- SpoolDamaged          what was read is not what was written
    |-- LimitReached         a bound of ours: nobody is to blame
    |-- ConfigurationError   gateway.toml, environment, files and ports named there
    |-- DeviceError          the device's own end: it could not connect, or the gateway ended the session
    |   |-- DeviceRefused         the gateway did not prove the key, or did not believe ours: trying again rarely helps
    |   '-- MessageRefused        the gateway answered one message with an error
    '-- ControlError         the control socket of a running gateway

Every text is one line that says what is wrong and, to a user, what to do. None holds a key.
Foreign exceptions are mapped here where their library is imported, `from exc`.
"""

import enum

__all__ = [
    "BackendError",
    "BackendRefused",
    "BackendUnavailable",
    "ConfigurationError",
    "ControlError",
    "DeviceError",
    "DeviceRefused",
    "GatewayError",
    "LimitReached",
    "MessageRefused",
    "PeerError",
    "PeerFault",
    "RegistryError",
    "RegistryMismatch",
    "RegistryRefused",
    "RegistryUnavailable",
    "SpoolDamaged",
    "SpoolError",
    "SpoolFull",
]


class GatewayError(Exception):
    """Whatever the gateway raises on purpose."""


class PeerFault(enum.Enum):
    """What a peer did wrong, with the TLS alert that answers it (RFC 8446 section 6, None: close without one)."""

    NOT_TLS = ("not_tls", None)
    UNSUPPORTED_RECORD = ("unsupported_record", 10)  # unexpected_message
    MALFORMED = ("malformed", 50)  # decode_error
    OVERSIZED = ("oversized", 50)  # decode_error: past the bound nothing is decoded
    RECORD_OVERFLOW = ("record_overflow", 22)  # section 5.1
    ILLEGAL_PARAMETER = ("illegal_parameter", 47)
    UNRECOGNIZED_NAME = ("unrecognized_name", 112)
    UNKNOWN_PSK_IDENTITY = ("unknown_psk_identity", 115)
    PROXY_HEADER = ("proxy_header", None)  # a balancer's fault: there is no TLS yet to answer in

    def __init__(self, label: str, alert: int | None) -> None:
        self.label = label
        self.alert = alert


class PeerError(GatewayError):
    """The peer sent what no correct peer sends."""

    def __init__(self, fault: PeerFault, detail: str) -> None:
        super().__init__(fault, detail)
        self.fault = fault
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


class RegistryError(GatewayError):
    """The registry could not do what was asked."""


class RegistryUnavailable(RegistryError):
    """The registry is away, locked or too slow; the same call may succeed later."""


class RegistryMismatch(RegistryError):
    """The registry answers, but its schema or its master key does not fit."""


class RegistryRefused(RegistryError):
    """The registry is well and the request is not: unknown, duplicate or invalid."""


class BackendError(GatewayError):
    """A backend did not take a message."""


class BackendUnavailable(BackendError):
    """The backend is away, full or timed out; sending again may help.

    `retry_after_s`: the backend asked to be left alone for so many seconds.
    """

    def __init__(self, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class BackendRefused(BackendError):
    """The backend will never take this message."""


class SpoolError(GatewayError):
    """A spool could not be read or written."""


class SpoolFull(SpoolError):
    """The disk under a spool is full."""


class SpoolDamaged(SpoolError):
    """A spool file is not what was written."""


class LimitReached(GatewayError):
    """A bound of `[limits]` keeps this connection or message out for now."""


class ConfigurationError(GatewayError):
    """The configuration, or a file, address or permission that it names, is wrong."""


class DeviceError(GatewayError):
    """A device's client could not connect, or the gateway ended the session."""


class DeviceRefused(DeviceError):
    """One end refuses the other: wrong identity, key, hint or suite, or no TLS-PSK gateway at all."""


class MessageRefused(DeviceError):
    """The gateway answered one message with an error; `reason` is its word (`too_long`, `invalid`, ...)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the gateway refused the message: {self.reason}"


class ControlError(GatewayError):
    """A running gateway could not be reached, or did not do what it was told."""
