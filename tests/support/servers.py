"""Real servers for the backends, each a process of its own on ephemeral ports, with a login and with mutual TLS.

A server that is not installed skips the test visibly, or fails it where `CI` is set.
"""

import abc
import contextlib
import datetime as dt
import importlib.util
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = [
    "PASSWORD",
    "USER",
    "Certificates",
    "HttpServer",
    "KafkaMock",
    "MosquittoServer",
    "NatsServer",
    "RabbitServer",
    "RedisServer",
    "Server",
    "free_port",
    "missing",
    "wait_until",
]

USER = "gateway"
PASSWORD = "correct:horse/battery@staple"
"""With what a URL must have percent-encoded."""
START_S = 60


def free_port() -> int:
    """A TCP port of this host that nobody uses just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def missing(what: str) -> None:
    """Skip at home, fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Poll until it is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


def program(*names: str) -> str:
    """The first of these programs that is there."""
    path = os.pathsep.join(
        [os.environ.get("PATH", ""), "/usr/sbin", "/usr/lib/rabbitmq/bin", str(Path(sys.executable).parent)]
    )
    for name in names:
        if found := shutil.which(name, path=path):
            return found
    missing(names[0])
    raise AssertionError


# Certificates


class Certificates:
    """A CA with a server's and a client's certificate, and another CA that nobody trusts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = folder / "ca.pem"
        self.other_ca = folder / "other-ca.pem"
        ca_key, ca_name = self._write_ca(self.ca, "test CA")
        self._write_ca(self.other_ca, "another CA")
        self.server, self.server_key = self._write(folder / "server", ca_key, ca_name)
        self.client, self.client_key = self._write(folder / "client", ca_key, ca_name)

    def _write_ca(self, path: Path, common_name: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Name]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = _builder(name, name, key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return key, name

    def _write(self, stem: Path, ca_key: ec.EllipticCurvePrivateKey, issuer: x509.Name) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, stem.name)])
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
        )
        certificate = _builder(name, issuer, key.public_key()).add_extension(names, critical=False)
        signed = certificate.sign(ca_key, hashes.SHA256())
        chain, key_path = stem.with_suffix(".pem"), stem.with_suffix(".key")
        chain.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return chain, key_path

    @property
    def settings(self) -> dict[str, Any]:
        """The TLS keys of a backend."""
        return {"ca_file": str(self.ca), "cert_file": str(self.client), "key_file": str(self.client_key)}


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=2))
    )


# Servers


class Server(abc.ABC):
    """A server in `folder`; it keeps its ports over `stop` and `start`."""

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.certificates = certificates
        self.port = free_port()
        self.tls_port = free_port()
        self.log_path = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @abc.abstractmethod
    def command(self) -> list[str]:
        """What to run; writes the configuration first."""

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def is_ready(self) -> bool:
        """Whether it serves."""
        return _connects(self.port)

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        command = self.command()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment(),
                cwd=self.folder,
                start_new_session=True,
            )
        wait_until(self._is_up, START_S, f"{command[0]}, log {self.log_path}")

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log_path.read_text()[-2000:]
        return self.is_ready()

    def stop(self) -> None:
        """End it; nothing happens when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        family = self._family(process)
        for each in family:
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait(10)
        assert process.stdin is not None
        process.stdin.close()
        psutil.wait_procs(family, 10)

    def freeze(self) -> None:
        """Let it take no CPU time: connections stay, nothing is answered."""
        assert self._process is not None
        family = self._family(self._process)
        for each in family:
            each.suspend()
        wait_until(lambda: all(map(_stands_still, family)), 10, "a stop of all threads")

    def thaw(self) -> None:
        """Let it go on."""
        if self._process is not None:
            for each in self._family(self._process):
                each.resume()

    @staticmethod
    def _family(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            return [*parent.children(recursive=True), parent]
        return []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _stands_still(process: psutil.Process) -> bool:
    """Each thread takes the signal for itself, after a while on a busy machine."""
    states = [
        stat.read_text().rpartition(")")[2].split()[0]
        for stat in Path(f"/proc/{process.pid}/task").glob("*/stat")
    ]
    return all(state in "TZX" for state in states)


def _connects(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class MosquittoServer(Server):
    """Mosquitto; clients may publish to `denied/#` in no case."""

    def command(self) -> list[str]:
        broker = program("mosquitto")
        passwords, access, config = (self.folder / name for name in ("passwords", "acl", "mosquitto.conf"))
        passwords.unlink(missing_ok=True)
        subprocess.run(
            [program("mosquitto_passwd"), "-c", "-b", passwords, USER, PASSWORD],
            check=True,
            capture_output=True,
        )
        access.write_text("topic deny denied/#\ntopic readwrite #\npattern deny denied/#\n")
        tls = self.certificates
        config.write_text(
            f"per_listener_settings false\nallow_anonymous false\npassword_file {passwords}\nacl_file {access}\n"
            f"user root\nlog_type all\nmax_queued_messages 0\n"
            f"listener {self.port} 127.0.0.1\n"
            f"listener {self.tls_port} 127.0.0.1\ncafile {tls.ca}\ncertfile {tls.server}\nkeyfile {tls.server_key}\n"
            "require_certificate true\n"
        )
        access.write_text(f"user {USER}\ntopic deny denied/#\ntopic readwrite #\n")
        return [broker, "-c", str(config)]


class NatsServer(Server):
    """nats-server with JetStream; one process per listener would be needed for TLS beside plain, so `tls` says which."""

    def __init__(self, folder: Path, certificates: Certificates, *, tls: bool = False) -> None:
        super().__init__(folder, certificates)
        self.tls = tls

    def command(self) -> list[str]:
        server = program("nats-server")
        config = self.folder / "nats.conf"
        certificates = self.certificates
        tls = (
            f'tls {{ ca_file: "{certificates.ca}", cert_file: "{certificates.server}", '
            f'key_file: "{certificates.server_key}", verify: true }}\n'
            if self.tls
            else ""
        )
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\njetstream {{ store_dir: "{self.folder / "store"}" }}\n'
            f'authorization {{ user: "{USER}", password: "{PASSWORD}" }}\n{tls}'
        )
        return [server, "-c", str(config)]


class RedisServer(Server):
    """Redis with a user and a password."""

    def command(self) -> list[str]:
        server = program("redis-server")
        config = self.folder / "redis.conf"
        tls = self.certificates
        config.write_text(
            f'bind 127.0.0.1\nport {self.port}\ntls-port {self.tls_port}\ndir "{self.folder}"\nsave ""\nappendonly yes\n'
            f"tls-ca-cert-file {tls.ca}\ntls-cert-file {tls.server}\ntls-key-file {tls.server_key}\n"
            f'tls-auth-clients yes\nuser default off\nuser {USER} on ">{PASSWORD}" ~* &* +@all\n'
        )
        return [server, str(config)]


class RabbitServer(Server):
    """RabbitMQ, with an epmd of its own."""

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self._epmd_port = free_port()
        self._dist_port = free_port()
        self._epmd: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        server = "/usr/lib/rabbitmq/bin/rabbitmq-server"
        if not Path(server).exists():
            missing("rabbitmq-server")
        tls = self.certificates
        (self.folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nlisteners.ssl.1 = 127.0.0.1:{self.tls_port}\n"
            f"ssl_options.cacertfile = {tls.ca}\nssl_options.certfile = {tls.server}\n"
            f"ssl_options.keyfile = {tls.server_key}\nssl_options.verify = verify_peer\n"
            "ssl_options.fail_if_no_peer_cert = true\nlog.console = true\nlog.file = false\nloopback_users = none\n"
            f"default_user = {USER}\ndefault_pass = {PASSWORD}\nnum_acceptors.tcp = 2\nnum_acceptors.ssl = 2\n"
            "disk_free_limit.absolute = 1MB\n"
        )
        (self.folder / "enabled_plugins").write_text("[].\n")
        return [server]

    def environment(self) -> dict[str, str]:
        return dict(os.environ) | {
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"t{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "logs"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 -start_epmd false",
        }

    def start(self) -> None:
        if self._epmd is None:
            self._epmd = subprocess.Popen(
                [program("epmd"), "-port", str(self._epmd_port), "-address", "127.0.0.1"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wait_until(lambda: _connects(self._epmd_port), START_S, "epmd")
        super().start()

    def is_ready(self) -> bool:
        return _connects(self.port) and _connects(self.tls_port)

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()


class KafkaMock(Server):
    """The cluster that librdkafka carries for its own tests: the real wire protocol, one broker, no login, no TLS.

    Its port is the kernel's choice. What it holds is in memory, so it is taken `down` and `up` where others are stopped
    and started.
    """

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.address_path = folder / "address"

    def command(self) -> list[str]:
        if importlib.util.find_spec("confluent_kafka") is None:
            missing("confluent-kafka")
        self.address_path.unlink(missing_ok=True)
        return [sys.executable, str(Path(__file__).with_name("kafka_mock.py")), str(self.folder)]

    def is_ready(self) -> bool:
        return self.address_path.exists()

    @property
    def address(self) -> str:
        return self.address_path.read_text()

    def order(self, what: str) -> None:
        """Have it do something, see kafka_mock.py."""
        assert self._process is not None
        assert self._process.stdin is not None
        told = self.log_path.read_text().splitlines().count(what)
        self._process.stdin.write(f"{what}\n".encode())
        self._process.stdin.flush()
        wait_until(lambda: self.log_path.read_text().splitlines().count(what) > told, 10, what)


class HttpServer(Server):
    """An aiohttp server that keeps every request in a file; the first part of the path says how it answers.

    `/events` asks for the login, `/open` does not; `/status/503/7` answers 503 with Retry-After: 7; `/mood` answers what
    stands in the file `mood`; `/echo` answers with the body.
    """

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.requests_path = folder / "requests.jsonl"
        self.mood_path = folder / "mood"

    def command(self) -> list[str]:
        tls = self.certificates
        arguments = [
            self.port,
            self.tls_port,
            self.folder,
            tls.ca,
            tls.server,
            tls.server_key,
            USER,
            PASSWORD,
        ]
        return [sys.executable, "-c", _HTTP_SERVER, *map(str, arguments)]

    def is_ready(self) -> bool:
        return _connects(self.port) and _connects(self.tls_port)

    def requests(self) -> list[dict[str, Any]]:
        """What was posted and answered with 2xx: path, headers, body (latin-1)."""
        if not self.requests_path.exists():
            return []
        return [json.loads(line) for line in self.requests_path.read_text().splitlines()]


_HTTP_SERVER = """
import asyncio, base64, json, pathlib, ssl, sys
from aiohttp import web
port, tls_port, folder, ca, certificate, key, user, password = sys.argv[1:]
folder = pathlib.Path(folder)
wanted = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
log = (folder / "requests.jsonl").open("a")

async def answer(request):
    body = await request.read()
    parts = request.path.split("/")
    status, headers = 200, {}
    if parts[1] == "events" and request.headers.get("Authorization") != wanted:
        status = 401
    elif parts[1] == "status":
        status = int(parts[2])
        headers = {"Retry-After": parts[3]} if len(parts) > 3 else {}
    elif parts[1] == "mood":
        status = int((folder / "mood").read_text())
    elif parts[1] == "pick" and b"poison" in body:
        status = 422
    if status < 300:
        log.write(json.dumps({"path": request.path, "headers": dict(request.headers), "body": body.decode("latin-1")}) + "\\n")
        log.flush()
    return web.Response(status=status, headers=headers, body=body if parts[1] == "echo" else b"taken")

async def main():
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificate, key)
    await web.TCPSite(runner, "127.0.0.1", int(port), reuse_address=True).start()
    await web.TCPSite(runner, "127.0.0.1", int(tls_port), ssl_context=context, reuse_address=True).start()
    await asyncio.Event().wait()

asyncio.run(main())
"""
