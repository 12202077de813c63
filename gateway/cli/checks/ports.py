"""Can the gateway listen where it is to, and may only those who should ask its admin endpoint?"""

import datetime as dt
import errno
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway.cli.checks.finding import Finding

if TYPE_CHECKING:
    from gateway.config import GatewaySettings
    from gateway.server.settings import Address

__all__ = ["check_admin", "check_ports"]

CERTIFICATE_DAYS_MIN: Final = 14


def check_ports(settings: "GatewaySettings", *, is_running: bool) -> Iterator[Finding]:
    wanted = [(f"listener {each.name}", each.bind) for each in settings.listeners]
    wanted.append(("admin endpoint", settings.admin.bind))
    for name, address in wanted:
        if not address.port:
            yield Finding("ports", "ok", f"{name}: the kernel chooses its port")
        elif is_running:
            yield _answering(name, address)
        else:
            yield _bindable(name, address)


def _answering(name: str, address: "Address") -> Finding:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 -- compared, not bound
    try:
        with socket.create_connection((host, address.port), 3):
            pass
    except OSError as exc:
        return Finding(
            "ports", "error", f"{name}: the gateway runs and {address} does not answer: {exc.strerror or exc}",
            "see the gateway's log; the configuration may be newer than the running gateway: restart it",
        )  # fmt: skip
    return Finding("ports", "ok", f"{name}: {address} answers")


def _bindable(name: str, address: "Address") -> Finding:
    try:
        for family, kind, protocol, _, where in socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(where)
                sock.listen(1)
    except OSError as exc:
        fix = {
            errno.EADDRINUSE: f"stop what listens there (`ss -ltnp 'sport = :{address.port}'` names it), or choose another port",
            errno.EACCES: "choose a port from 1024, or give the program CAP_NET_BIND_SERVICE",
            errno.EADDRNOTAVAIL: f"{address.host} is no address of this host: choose one of `ip address`, or 0.0.0.0",
        }.get(exc.errno or 0, "choose another address")
        return Finding("ports", "error", f"{name}: cannot listen on {address}: {exc.strerror or exc}", fix)
    return Finding("ports", "ok", f"{name}: {address} is free")


def check_admin(settings: "GatewaySettings") -> Iterator[Finding]:
    """Whether strangers can read the metrics, and for how long the certificate is good."""
    admin = settings.admin
    knows_clients = admin.token is not None or (
        admin.tls is not None and admin.tls.client_ca_file is not None
    )
    if not _is_loopback(admin.bind.host) and not (admin.tls is not None and knows_clients):
        yield Finding(
            "admin", "warning", f"anybody who reaches {admin.bind} can read the metrics, or the token on its way",
            "set admin.tls and admin.token, or bind it to 127.0.0.1",
        )  # fmt: skip
    elif admin.tls is None:
        yield Finding("admin", "ok", f"{admin.bind} is for this host alone")
    if admin.tls is not None:
        yield _certificate(admin.tls.certificate_file)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _certificate(file: Path) -> Finding:
    from cryptography import x509

    fix = f"put a certificate with its chain (PEM) into {file}; a running gateway takes it at the next scrape"
    try:
        until = x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc
    except OSError as exc:
        return Finding("admin", "error", f"admin.tls.certificate_file {file}: {exc.strerror}", fix)
    except ValueError:
        return Finding("admin", "error", f"admin.tls.certificate_file {file} is no certificate in PEM", fix)
    left = until - dt.datetime.now(dt.UTC)
    detail = f"its certificate is good until {until:%Y-%m-%dT%H:%M:%SZ}"
    if left < dt.timedelta():
        return Finding("admin", "error", f"its certificate ended {until:%Y-%m-%dT%H:%M:%SZ}", fix)
    if left < dt.timedelta(days=CERTIFICATE_DAYS_MIN):
        return Finding("admin", "warning", detail, fix)
    return Finding("admin", "ok", detail)
