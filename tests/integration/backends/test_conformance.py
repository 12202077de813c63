"""`check_backend`: what every backend promises, each checked against a real server."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import pytest

from gateway.errors import BackendUnavailable
from gateway.forward.backends import Sink
from gateway.forward.message import Message
from gateway.forward.receipt import Receipt
from tests.support.backends import CONTENT_TYPE, SUBJECTS, WRONG, Subject, make_sink, message
from tests.support.servers import PASSWORD, Certificates

# paho does not close the socket of a TLS handshake that failed; the collector of garbage does, and says so.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)

DEADLINE_S = 40
FROZEN_S = 0.4


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[Subject]:
    if request.param == "amqp":
        yield request.getfixturevalue("amqp")
        return
    subject = SUBJECTS[request.param](tmp_path_factory.mktemp(request.param), certificates)
    server = getattr(subject, "server", None)
    if server is None:
        yield subject
        return
    with server:
        yield subject
        subject.stop()


@pytest.fixture
def subject(running: Subject) -> Subject:
    running.begin()
    return running


async def deliver_all(sink: Sink, batch: list[Message], deadline_s: float = 20) -> int:
    """As a spool does: send again what is not settled, until all is. Returns how many tries failed."""
    give_up_at = time.monotonic() + deadline_s
    failed = 0
    while batch:
        try:
            receipt = await sink.deliver(batch)
        except BackendUnavailable:
            receipt = Receipt(settled=0, error=BackendUnavailable(""))
        assert receipt is None or not receipt.refused
        if receipt is None or receipt.settled is None:
            break
        batch = batch[receipt.settled :]
        failed += 1
        assert time.monotonic() < give_up_at, "the backend does not come back"
        await asyncio.sleep(0.05)
    return failed


def assert_safe(receipt: Receipt | None) -> None:
    """All of the batch was taken."""
    assert receipt is None or (receipt.settled is None and not receipt.refused), receipt


def without_repeats(numbers: list[int]) -> list[int]:
    return list(dict.fromkeys(numbers))


# What is checked


async def confirms(subject: Subject) -> None:
    """Delivered means: it is there, whole, with its attributes."""
    sink = make_sink(subject.settings())
    await sink.open()
    assert_safe(await sink.deliver([message(1)]))
    await sink.close()
    (got,) = await asyncio.to_thread(subject.arrived, 1)
    assert got.payload == "payload 1 äöü".encode()
    expected = {
        "specversion": "1.0",
        "id": f"s1-{1:020d}",
        "source": "/realms/default/devices/meter-7",
        "type": "device.payload",
        "time": "2023-11-14T22:13:20.250000Z",
        "realm": "default",
        "device": "meter-7",
        "sequence": f"{1:020d}",
        "datacontenttype": CONTENT_TYPE,
    }
    attributes = {key: unquote(value) for key, value in got.attributes.items()}
    assert {key: attributes[key] for key in expected} == expected


async def keeps_order(subject: Subject) -> None:
    """Batches one after the other, two sessions mixed: each session arrives in order, nothing twice."""
    sink = make_sink(subject.settings())
    await sink.open()
    numbers = iter(range(1, 10_000))
    sent = []
    for size in (1, 2, 50, 1, 200):
        batch = [message(next(numbers), session=f"s{each % 2}") for each in range(size)]
        assert_safe(await sink.deliver(batch))
        sent += batch
    await sink.close()
    got = await asyncio.to_thread(subject.arrived, len(sent))
    assert len(got) == len(sent)
    for session in ("s0", "s1"):
        expected = [each.event_id for each in sent if each.session == session]
        assert [each.id for each in got if each.id.startswith(f"{session}-")] == expected


async def takes_a_batch(subject: Subject) -> None:
    """500 messages, some of 60,000 bytes, from many devices."""
    sink = make_sink(subject.settings())
    await sink.open()
    batch = [
        message(
            each,
            session=f"s{each % 40}",
            device=f"d{each % 40}",
            payload=b"x" * (60_000 if each % 50 == 0 else each),
        )
        for each in range(1, 501)
    ]
    assert_safe(await sink.deliver(batch))
    await sink.close()
    got = await asyncio.to_thread(subject.arrived, 500)
    assert sorted((each.id, each.payload) for each in got) == sorted(
        (each.event_id, each.payload) for each in batch
    )


async def opens_later(subject: Subject) -> None:
    """A sink whose `open` was never called, or failed, connects when it is needed."""
    sink = make_sink(subject.settings())
    assert await deliver_all(sink, [message(1)]) == 0
    await sink.close()
    await asyncio.to_thread(subject.arrived, 1)


async def closes_twice(subject: Subject) -> None:
    """Also unopened, and after `open`."""
    sink = make_sink(subject.settings())
    await sink.close()
    await sink.open()
    await sink.close()
    await sink.close()


async def holds_back(subject: Subject) -> None:
    """A server that does nothing confirms nothing; when it goes on, everything arrives."""
    sink = make_sink(subject.settings())
    await sink.open()
    assert_safe(await sink.deliver([message(1)]))
    batch = [message(each) for each in range(2, 102)]
    subject.server.freeze()
    try:
        async with asyncio.TaskGroup() as tasks:
            delivering = tasks.create_task(deliver_all(sink, batch))
            done, _ = await asyncio.wait([delivering], timeout=FROZEN_S)
            assert not done
            subject.server.thaw()
    finally:
        subject.server.thaw()
    await sink.close()
    got = await asyncio.to_thread(subject.arrived, 101)
    assert without_repeats([each.sequence for each in got]) == list(range(1, 102))


async def survives_a_cancelled_send(subject: Subject) -> None:
    """Cancelled while the server hangs, and working again afterwards, in order."""
    sink = make_sink(subject.settings())
    await sink.open()
    assert_safe(await sink.deliver([message(1)]))
    first = [message(each) for each in range(2, 52)]
    subject.server.freeze()
    try:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sink.deliver(first), FROZEN_S)
    finally:
        subject.server.thaw()
    await deliver_all(sink, [*first, message(52)])
    await sink.close()
    got = await asyncio.to_thread(subject.arrived, 52)
    # What was under way when it was cancelled may arrive beside what is sent again: each copy is in order.
    assert set(range(1, 53)) == {each.sequence for each in got}
    assert got[-1].sequence in {51, 52}
    assert without_repeats([each.sequence for each in got]) == list(range(1, 53))


async def reconnects(subject: Subject) -> None:
    """The server goes away and comes back at the same address."""
    sink = make_sink(subject.settings())
    await sink.open()
    assert_safe(await sink.deliver([message(1), message(2)]))
    before = await asyncio.to_thread(subject.arrived, 2)
    assert [each.sequence for each in before] == [1, 2]
    await asyncio.to_thread(subject.stop)
    with pytest.raises(BackendUnavailable) as caught:
        await sink.deliver([message(3)])
    assert "\n" not in str(caught.value)
    with pytest.raises(BackendUnavailable):
        await make_sink(subject.settings()).open()
    await asyncio.to_thread(subject.start)
    await deliver_all(sink, [message(3), message(4)])
    await sink.close()
    got = await asyncio.to_thread(subject.arrived, 4)
    assert without_repeats([each.sequence for each in got]) == [1, 2, 3, 4]


async def is_told_of_a_wrong_login(subject: Subject) -> None:
    """BackendUnavailable (an operator repairs it), saying so, without the secret."""
    sink = make_sink(subject.wrong_login())
    with pytest.raises(BackendUnavailable, match=r"credentials|user name and password") as caught:
        await sink.deliver([message(1)])
    await sink.close()
    assert WRONG not in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert str(caught.value).startswith("backend under-test: ")
    await asyncio.sleep(0)


async def speaks_tls(subject: Subject) -> None:
    """With CA and client certificate it works; without either, or with another CA, it is refused."""
    tls_server = getattr(subject, "tls_server", None)
    if tls_server is not None:
        tls_server.start()
        plain_server, subject.server = subject.server, tls_server
    try:
        settings = subject.tls_settings()
        sink = make_sink(settings)
        await sink.open()
        if tls_server is None:
            assert_safe(await sink.deliver([message(1)]))
            (got,) = await asyncio.to_thread(subject.arrived, 1)
            assert got.sequence == 1
        await sink.close()
        settings["connect_timeout_s"] = 2
        without_certificate = {
            key: value for key, value in settings.items() if key not in {"cert_file", "key_file"}
        }
        for wrong in (
            settings | {"ca_file": str(subject.certificates.other_ca)},
            without_certificate,
            settings | {"ca_file": "/nonexistent/ca.pem"},
        ):
            sink = make_sink(wrong)
            with pytest.raises(BackendUnavailable):
                await sink.deliver([message(2)])
            await sink.close()
    finally:
        if tls_server is not None:
            tls_server.stop()
            subject.server = plain_server


Check = Callable[[Subject], Coroutine[Any, Any, None]]

ASPECTS: Final[tuple[Check, ...]] = (
    confirms,
    keeps_order,
    takes_a_batch,
    opens_later,
    closes_twice,
    holds_back,
    survives_a_cancelled_send,
    reconnects,
    is_told_of_a_wrong_login,
    speaks_tls,
)

NEEDS: Final[dict[Check, str]] = {
    holds_back: "can_freeze",
    survives_a_cancelled_send: "can_freeze",
    reconnects: "can_restart",
    is_told_of_a_wrong_login: "has_login",
    speaks_tls: "has_tls",
}


CASES: Final = [
    pytest.param(kind, aspect, id=f"{kind}-{aspect.__name__}")
    for kind, subject in SUBJECTS.items()
    for aspect in ASPECTS
    if aspect not in NEEDS or getattr(subject, NEEDS[aspect])
]
"""What there is to check of each kind: a file has no server to freeze, and librdkafka's mock cluster no login."""


@pytest.mark.parametrize(("running", "aspect"), CASES, indirect=["running"], scope="module")
def test_check_backend(subject: Subject, aspect: Check, tmp_path: Path) -> None:  # noqa: ARG001 -- keeps pytest's own folder apart
    asyncio.run(asyncio.wait_for(aspect(subject), DEADLINE_S))
