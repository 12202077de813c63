"""What the fuzzers call: one function per place where bytes of strangers are parsed.

Each takes any bytes, and fails (an assertion, or an exception that its parser does not document) when an invariant is
broken: the verdict depends on the bytes and not on how they were cut, what is held is bounded, and only the documented
error is raised. `python -m tests.fuzz TARGET` looks for such bytes; what it found stands in `corpus/TARGET/` and is
replayed by the test suite.
"""

import asyncio
import ipaddress
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from gateway.config import effective, load
from gateway.errors import ConfigurationError, PeerError, PeerFault, RegistryRefused
from gateway.registry.formats import FORMATS
from gateway.registry.formats.base import FileDevice, Ignored
from gateway.registry.formats.source import BadLine, DeviceFile
from gateway.registry.identities import KEY_BYTES_MAX, KEY_BYTES_MIN, is_identity
from gateway.server.control.channel import Channel
from gateway.server.control.messages import Done, Message
from gateway.wire.client_hello import HelloScanner
from gateway.wire.framing import Frame, FrameDecoder, LineDecoder, split_message_id
from gateway.wire.hello_memory import HelloMemory
from gateway.wire.length_framing import LengthDecoder
from gateway.wire.mqtt_connect import CONNECT_BYTES_MAX, ConnectError, ConnectScanner
from gateway.wire.proxy_protocol import ProxyHeader, ProxyHeaderScanner

__all__ = ["CORPUS", "TARGETS", "corpus_of"]

CORPUS: Final = Path(__file__).parent / "corpus"

HELLO_BYTES_MAX: Final = 2048
KNOWN_HELLOS: Final = [
    bytes.fromhex((Path(__file__).parents[1] / "unit/wire/vectors" / f"{name}.hex").read_text())
    for name in ("openssl-defaults", "node-defaults", "gnutls-tls12-psk")
]
MESSAGE_BYTES_MAX: Final = 100


def corpus_of(target: str) -> list[Path]:
    """The committed inputs of a target, in a stable order."""
    return sorted((CORPUS / target).iterdir())


def client_hello(data: bytes) -> None:
    """The scanner of the ClientHello: one verdict for all ways to cut the bytes, bounded memory, PeerError alone."""
    verdict = _hello([data])
    assert verdict == _hello(_pieces(data, 1)) == _hello(_pieces(data, _size(data)))
    if len(data) <= HELLO_BYTES_MAX:
        assert _remembered(data) in (None, verdict)


def _remembered(data: bytes) -> object:
    """What a memory says that knows some real hellos, which `data` may resemble."""
    memory = HelloMemory()
    for known in KNOWN_HELLOS:
        memory.read(known)
    try:
        return memory.read(data)
    except PeerError as exc:
        return exc.args


def _hello(pieces: list[bytes]) -> object:
    scanner = HelloScanner(HELLO_BYTES_MAX)
    for piece in pieces:
        try:
            hello = scanner.feed(piece)
        except PeerError as exc:
            return exc.args
        if hello is not None:
            return hello
        assert len(scanner.received) <= HELLO_BYTES_MAX + 5
    return None


def lines(data: bytes) -> None:
    """The line framing, with the optional ids of messages."""
    for frame in _frames(data, LineDecoder):
        if isinstance(frame, bytes):
            _split_id(frame)


def length16(data: bytes) -> None:
    """The framing by a 2-byte length."""
    _frames(data, lambda bound: LengthDecoder(2, bound))


def length32(data: bytes) -> None:
    """The framing by a 4-byte length."""
    _frames(data, lambda bound: LengthDecoder(4, bound))


def _frames(data: bytes, decoder: Callable[[int], FrameDecoder]) -> list[Frame]:
    """The frames, the same for all ways to cut the bytes; none of them is over the bound."""
    at_once = _decoded([data], decoder)
    assert at_once == _decoded(_pieces(data, 1), decoder) == _decoded(_pieces(data, _size(data)), decoder)
    assert all(len(frame) <= MESSAGE_BYTES_MAX for frame in at_once if isinstance(frame, bytes))
    return at_once


def _decoded(pieces: list[bytes], decoder: Callable[[int], FrameDecoder]) -> list[Frame]:
    decoding = decoder(MESSAGE_BYTES_MAX)
    return [frame for piece in pieces for frame in decoding.feed(piece)] + decoding.finish()


def _split_id(frame: bytes) -> None:
    try:
        message_id, payload = split_message_id(frame)
    except ValueError:
        return
    assert f"{message_id} ".encode() + payload == frame


def mqtt_connect(data: bytes) -> None:
    """The CONNECT packet of MQTT 3.1.1 and 5: one verdict for all ways to cut the bytes, ConnectError alone."""
    assert _connect([data]) == _connect(_pieces(data, 1)) == _connect(_pieces(data, _size(data)))


def _connect(pieces: list[bytes]) -> object:
    scanner = ConnectScanner()
    for piece in pieces:
        try:
            connect = scanner.feed(piece)
        except ConnectError as exc:
            return exc.fault, exc.level
        if connect is not None:
            return connect
        assert len(scanner._held) <= CONNECT_BYTES_MAX
    return None


def proxy_header(data: bytes) -> None:
    """The PROXY header, versions 1 and 2: one verdict for all ways to cut the bytes, and PROXY_HEADER alone."""
    at_once = _proxy_header([data])
    assert at_once == _proxy_header(_pieces(data, 1)) == _proxy_header(_pieces(data, _size(data)))
    if isinstance(at_once, tuple):
        _check_proxy_header(at_once[0])
    else:
        assert at_once in {None, PeerFault.PROXY_HEADER}


def _proxy_header(pieces: list[bytes]) -> "tuple[ProxyHeader, bytes] | PeerFault | None":
    """The header and all that follows it; the fault; None while bytes are missing."""
    scanner = ProxyHeaderScanner()
    for number, piece in enumerate(pieces, 1):
        try:
            header = scanner.feed(piece)
        except PeerError as exc:
            return exc.fault
        if header is not None:
            return header, scanner.rest + b"".join(pieces[number:])
    return None


def _check_proxy_header(header: ProxyHeader) -> None:
    assert (header.source is None) == (header.destination is None)
    for end in (header.source, header.destination):
        if end is not None:
            ipaddress.ip_address(end[0])
            assert 0 <= end[1] <= 65535


def import_formats(data: bytes) -> None:
    """A file of devices, read as every format there is: valid devices, and one line of print for what is none."""
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        path.write_bytes(data)
        for form in FORMATS.values():
            parsed: list[FileDevice | BadLine | Ignored] = []
            refusal = ""
            with DeviceFile(path) as source:
                try:
                    parsed = list(form.read(source, form.key_encoding))
                except RegistryRefused as exc:  # of the whole file, which is no text
                    refusal = str(exc)
            assert refusal.isprintable()
            _check_devices(parsed, data)


def _check_devices(parsed: list[FileDevice | BadLine | Ignored], data: bytes) -> None:
    assert len(parsed) <= len(data)
    for each in parsed:
        assert 1 <= each.line <= data.count(b"\n") + 1
        if not isinstance(each, FileDevice):
            assert each.reason.isprintable()
            continue
        assert each.line <= each.last_line <= data.count(b"\n") + 1
        for credential in each.credentials:
            assert is_identity(credential.identity.encode())
            assert credential.key is None or KEY_BYTES_MIN <= len(credential.key) <= KEY_BYTES_MAX


def configuration(data: bytes) -> None:
    """gateway.toml: settings that can be shown, or one line that says what is wrong."""
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        path = Path(file.name)
        path.write_bytes(data)
        try:
            settings = load(path, {})
        except ConfigurationError as exc:
            refusal = str(exc)
        else:
            refusal = ""
            json.dumps(effective(settings))
    assert "\n" not in refusal, "an error of several lines"


def control(data: bytes) -> None:
    """The control channel: whatever arrives, it ends in an orderly way, and only known messages reach the handler."""
    asyncio.run(_serve(data))


async def _serve(data: bytes) -> None:
    async def answer(message: Message) -> Message:
        assert not isinstance(message, str)
        return Done()

    reader = asyncio.StreamReader(limit=2**26)
    reader.feed_data(data)
    reader.feed_eof()
    loop = asyncio.get_running_loop()
    with open("/dev/null", "wb") as sink:  # noqa: ASYNC230, PTH123 -- nothing blocks, and an event loop wants the file
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sink)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        await asyncio.wait_for(Channel(reader, writer, answer).serve(), 10)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        client_hello,
        proxy_header,
        lines,
        length16,
        length32,
        mqtt_connect,
        import_formats,
        configuration,
        control,
    )
}


def _size(data: bytes) -> int:
    """A size of pieces that depends on the bytes, so that a fuzzer can choose it."""
    return 2 + data[-1] % 61 if data else 2


def _pieces(data: bytes, size: int) -> list[bytes]:
    return list(_cut(data, size))


def _cut(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]
