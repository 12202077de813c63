"""A client against a TLS-PSK server that follows a script: answers that never come, come late, or come from nobody."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from gateway.device import (
    Client,
    ClientSettings,
    Command,
    DeviceError,
    DeviceKey,
    DeviceRefused,
    FileStore,
    Key,
    KeyRing,
    MemoryStore,
    MessageRefused,
    Receipt,
    Reply,
    StoreFull,
)
from gateway.device.store import Store
from gateway.tls.openssl import TlsVersion
from tests.support.psk_server import Conversation, PskServer, psk_server

RunAsync = Callable[[Coroutine[Any, Any, None]], None]
KEY = Key(bytes(range(32)))
RING = KeyRing.of("meter-7", KEY)
QUICK = ClientSettings(back_off_first_s=0.01, back_off_longest_s=0.05)


def answering(*answers: bytes) -> Callable[[Conversation, bytes], None]:
    """Answer frame after frame, over all connections, with these words; `{n}` is the frame's number in its session."""
    left = iter(answers)

    def script(conversation: Conversation, data: bytes) -> None:
        before = conversation.received.count(b"\n") - data.count(b"\n")
        for number in range(before + 1, before + data.count(b"\n") + 1):
            answer = next(left, b"ok {n}")
            if answer == b"cut":
                conversation.transport.abort()
                return
            if answer:
                conversation.send(answer.replace(b"{n}", b"%d" % number) + b"\n")

    return script


@contextlib.asynccontextmanager
async def connected(
    server: PskServer,
    *,
    settings: ClientSettings = QUICK,
    store: Store | None = None,
    ring: KeyRing = RING,
) -> AsyncIterator[Client]:
    async with (
        psk_server(server),
        Client("127.0.0.1", server.port, ring, settings=settings, store=store) as client,
    ):
        yield client


def serving(*answers: bytes, hint: str | None = None) -> PskServer:
    return PskServer({"meter-7": KEY.reveal()}, answering(*answers), hint=hint)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - any condition, not an event
            await asyncio.sleep(0.005)


def test_a_message_is_sent_and_acknowledged(run_async: RunAsync) -> None:
    async def scenario() -> None:
        async with connected(serving()) as client:
            first = await client.send(b"21.5")
            second = await client.send(b"21.6")
            assert first.message_id != second.message_id
            assert first.reply is None
            assert client.link is not None
            assert (client.link.version, client.link.identity) == ("TLSv1.3", "meter-7")
            assert client.unanswered == 0

    run_async(scenario())


def test_many_at_once_are_sent_in_order(run_async: RunAsync) -> None:
    async def scenario() -> None:
        server = serving()
        async with connected(server) as client:
            receipts = await asyncio.gather(*(client.send(b"%d" % number) for number in range(2000)))
            assert len({receipt.message_id for receipt in receipts}) == 2000
        assert server.conversations[0].received == b"".join(b"%d\n" % number for number in range(2000))
        assert server.conversations[0].finished

    run_async(scenario())


def test_a_final_refusal_raises_its_reason_and_the_others_go_on(run_async: RunAsync) -> None:
    async def scenario() -> None:
        async with connected(serving(b"ok {n}", b"error {n} invalid", b"ok {n}")) as client:
            results = await asyncio.gather(*(client.send(b"x") for _ in range(3)), return_exceptions=True)
            assert [type(result) for result in results] == [Receipt, MessageRefused, Receipt]
            with pytest.raises(ValueError, match="line break"):
                await client.send(b"a\nb")

    run_async(scenario())


def test_a_passing_refusal_is_sent_again_in_order(run_async: RunAsync) -> None:
    async def scenario() -> None:
        server = serving(b"ok {n}", b"error {n} unavailable", b"error {n} unavailable")
        async with connected(server) as client:
            await asyncio.gather(*(client.send(b"%d" % number) for number in range(3)))
        assert server.conversations[0].received == b"0\n1\n2\n1\n2\n"

    run_async(scenario())


def test_a_passing_refusal_can_be_told_at_once(run_async: RunAsync) -> None:
    async def scenario() -> None:
        settings = ClientSettings(resend=frozenset())
        async with connected(serving(b"error {n} unavailable"), settings=settings) as client:
            with pytest.raises(MessageRefused, match="unavailable") as caught:
                await client.send(b"x")
            assert caught.value.reason == "unavailable"

    run_async(scenario())


def test_what_had_no_answer_is_sent_again_on_the_next_connection(run_async: RunAsync) -> None:
    async def scenario() -> None:
        server = serving(b"ok {n}", b"cut")
        settings = ClientSettings(back_off_first_s=0.01, message_ids=True)
        async with connected(server, settings=settings) as client:
            await client.send(b"a")
            receipts = await asyncio.gather(client.send(b"b"), client.send(b"c"))
            assert client.problem is None
        first, second = server.conversations
        name = receipts[0].message_id.rpartition("-")[0].encode()
        assert first.received.splitlines() == [name + b"-1 a", name + b"-2 b", name + b"-3 c"]
        assert second.received.splitlines() == [name + b"-2 b", name + b"-3 c"]

    run_async(scenario())


def test_offline_messages_wait_and_are_sent_later(run_async: RunAsync, tmp_path: Path) -> None:
    async def scenario() -> None:
        server = serving()
        async with psk_server(server):
            port = server.port
        store = FileStore(tmp_path / "store.db")
        client = Client(
            "127.0.0.1", port, RING, store=store, settings=QUICK, start_offline=True, close_timeout_s=0
        )
        async with client:
            posted = await client.post(b"a")
            await client.post(b"b")
            await until(lambda: client.problem)
            assert "cannot connect" in str(client.problem)
        with pytest.raises(DeviceError, match="closed before"):
            await posted

        async with psk_server(server, port):
            store = FileStore(tmp_path / "store.db")
            async with Client("127.0.0.1", port, RING, store=store, settings=QUICK) as client:
                await client.send(b"c")
                assert client.unanswered == 0
        assert server.conversations[0].received == b"a\nb\nc\n"

    run_async(scenario())


def test_a_full_store_refuses(run_async: RunAsync) -> None:
    async def scenario() -> None:
        async with connected(serving(b"", b""), store=MemoryStore(messages_max=2)) as client:
            await client.post(b"a")
            await client.post(b"b")
            with pytest.raises(StoreFull):
                await client.send(b"c")
            await client.close(0)

    run_async(scenario())


def test_a_gateway_that_does_not_answer_is_left(run_async: RunAsync) -> None:
    async def scenario() -> None:
        settings = ClientSettings(answer_timeout_s=0.1, back_off_first_s=0.01)
        server = serving(b"")
        async with connected(server, settings=settings) as client:
            await client.send(b"a")
        assert len(server.conversations) == 2
        for conversation in server.conversations:
            assert conversation.received == b"a\n"

    run_async(scenario())


def test_why_a_gateway_was_left(run_async: RunAsync) -> None:
    async def scenario() -> None:
        settings = ClientSettings(answer_timeout_s=0.1, back_off_first_s=0.01)
        server = serving(b"")
        async with connected(server, settings=settings) as client:
            told: list[str] = []
            lost = client.link_lost

            def tell(error: DeviceError | None) -> None:
                told.append(str(client.problem))
                lost(error)

            client.link_lost = tell  # type: ignore[method-assign]
            await client.send(b"a")
            assert "has not answered for 0.1 s: is its backend well?" in told[0]

    run_async(scenario())


def test_a_gateway_that_stops_reading_is_left_and_memory_stays_bounded(run_async: RunAsync) -> None:
    async def scenario() -> None:
        server = serving()
        settings = ClientSettings(answer_timeout_s=0.3, back_off_first_s=0.01)
        async with connected(server, settings=settings) as client:
            server.conversations[0].transport.pause_reading()
            sending = asyncio.gather(*(client.send(bytes(60_000).replace(b"\0", b"x")) for _ in range(100)))
            await sending
        assert len(server.conversations) == 2

    run_async(scenario())


def test_replies_and_commands(run_async: RunAsync) -> None:
    async def scenario() -> None:
        server = serving(b"reply {n} 42", b"ok {n}\ncommand c1 set 5")
        async with connected(server) as client:
            receipt = await client.send(b"a")
            assert receipt.reply == b"42"
            await client.send(b"b")
            items = client.incoming()
            assert await anext(items) == Reply(receipt.message_id, b"42")
            assert await anext(items) == Command("c1", b"set 5")
            await client.close()
            assert [item async for item in items] == []

    run_async(scenario())


def test_what_nobody_reads_is_dropped_and_counted(run_async: RunAsync) -> None:
    async def scenario() -> None:
        server = serving(b"\n".join(b"command c%d x" % number for number in range(10)) + b"\nok {n}")
        async with connected(server, settings=ClientSettings(incoming_max=4)) as client:
            await client.send(b"a")
            assert client.incoming_dropped == 6
            assert await anext(client.incoming()) == Command("c6", b"x")

    run_async(scenario())


def test_what_is_read_slowly_makes_the_gateway_wait(run_async: RunAsync) -> None:
    async def scenario() -> None:
        server = serving()
        async with connected(server, settings=ClientSettings(incoming_max=10)) as client:
            await until(lambda: server.live)
            for number in range(200):
                server.live[0].send(b"command %d x\n" % number)
                await asyncio.sleep(0)
            seen = []
            async for item in client.incoming():
                assert isinstance(item, Command)
                seen.append(int(item.command_id))
                await asyncio.sleep(0)
                if item.command_id == "199":
                    break
            assert seen == sorted(seen)
            assert len(seen) + client.incoming_dropped == 200

    run_async(scenario())


@pytest.mark.parametrize("nonsense", [b"HTTP/1.0 400 Bad Request", b"ok 2", b"x" * 2000, b"ok 1\nok 1"])
def test_an_answer_that_no_gateway_gives_ends_the_connection(run_async: RunAsync, nonsense: bytes) -> None:
    async def scenario() -> None:
        settings = ClientSettings(back_off_first_s=0.01, incoming_bytes_max=1000)
        server = serving(nonsense)
        async with connected(server, settings=settings) as client:
            await client.send(b"a")
            await until(lambda: len(server.conversations) == 2)
            await client.online()
            await client.send(b"b")

    run_async(scenario())


def test_a_wrong_key_is_refused_at_once(run_async: RunAsync) -> None:
    async def scenario() -> None:
        wrong = KeyRing.of("meter-7", Key(bytes(32)[:-1] + b"x"))
        for hint in (None, "north"):
            with pytest.raises(DeviceRefused, match="refused the identity or the key"):
                async with connected(serving(hint=hint), ring=wrong):
                    pytest.fail("connected")

    run_async(scenario())


def test_a_hint_chooses_the_key_and_an_unknown_one_is_refused(run_async: RunAsync) -> None:
    async def scenario() -> None:
        ring = KeyRing(
            [DeviceKey("other", Key(bytes(range(32, 64))), "south"), DeviceKey("meter-7", KEY, "north")]
        )
        server = serving(hint="north")
        async with psk_server(server):
            async with Client("127.0.0.1", server.port, ring, highest=TlsVersion.TLS1_2) as client:
                await client.send(b"a")
                assert client.link is not None
                assert (client.link.hint, client.link.identity, client.link.version) == (
                    "north",
                    "meter-7",
                    "TLSv1.2",
                )
            with pytest.raises(DeviceRefused, match="default key of the ring was offered, other"):
                async with Client("127.0.0.1", server.port, ring):
                    pytest.fail("connected")  # TLS 1.3 has no hint: the default key was offered
            server.hint = "east"
            with pytest.raises(DeviceRefused, match=r"hint is 'east'.*'south', 'north'"):
                async with Client("127.0.0.1", server.port, ring, highest=TlsVersion.TLS1_2):
                    pytest.fail("connected")

    run_async(scenario())


def test_a_client_that_is_not_open_says_so(run_async: RunAsync) -> None:
    async def scenario() -> None:
        server = serving()
        async with connected(server) as client:
            pass
        with pytest.raises(DeviceError, match="not open"):
            await client.send(b"x")
        await client.close()
        with pytest.raises(DeviceError, match="no framing"):
            Client("127.0.0.1", 1, RING, settings=ClientSettings(framing="morse"))

    run_async(scenario())


def test_nothing_is_told_twice_over_many_cuts(run_async: RunAsync) -> None:
    async def scenario() -> None:
        pattern = [b"ok {n}", b"ok {n}", b"cut", b"ok {n}", b"error {n} full", b"cut", b"error {n} stopping"]
        server = serving(*(pattern * 20))
        settings = ClientSettings(back_off_first_s=0.002, back_off_longest_s=0.005, in_flight_max=5)
        told: list[str] = []
        async with connected(server, settings=settings) as client:

            async def send(number: int) -> None:
                told.append((await client.send(b"%d" % number)).message_id)

            await asyncio.gather(*(send(number) for number in range(60)))
        assert len(told) == len(set(told)) == 60
        seen = {int(line) for one in server.conversations for line in one.received.split()}
        assert seen == set(range(60))

    run_async(scenario())
