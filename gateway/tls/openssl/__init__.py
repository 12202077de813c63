"""The binding: the only package that names OpenSSL's `lib` and `ffi`.

Theory of operation
-------------------
pyOpenSSL makes the contexts; its maintainers keep the PSK symbols in the `cryptography` binding so that a context can be
extended, which is what happens here. `Engine` is one SSL object between two memory BIOs. It is a pump with no policy:
`feed` bytes from the network, `handshake` or `read`, then `drain` what must go to the network, also after an error,
because the alert is in there.

OpenSSL asks for keys by C callbacks that know only the `SSL *`. They come only while `SSL_do_handshake` runs, in the thread
that called it; there the engine stands in `per_thread` for exactly that time, so an engine that is gone cannot be found.
The scratch buffers are the thread's too: engines of several threads do not meet.
A callback never raises into C: an exception is kept and raised again by the pump that called OpenSSL.

Server contexts speak one version each (see `contexts`), so each has one PSK callback only:
TLS 1.2 the server callback, which sees the identity as a C string, cut at a NUL (which no valid identity holds);
TLS 1.3 the find-session callback, which sees every offered identity with its length. That one answers "not known" for
all but the identity that was chosen from the ClientHello, byte for byte; OpenSSL calls it again after a
HelloRetryRequest, and the same rule then keeps out identities that the first hello did not offer.
"""

from gateway.tls.openssl.contexts import COMMON_SIGNATURES, ClientContext, ServerContext, Trace
from gateway.tls.openssl.engine import RECORD_BYTES, Engine
from gateway.tls.openssl.library import TlsFailure, TlsVersion, library_version
from gateway.tls.openssl.watching import Watch

__all__ = [
    "COMMON_SIGNATURES",
    "RECORD_BYTES",
    "ClientContext",
    "Engine",
    "ServerContext",
    "TlsFailure",
    "TlsVersion",
    "Trace",
    "Watch",
    "library_version",
]
