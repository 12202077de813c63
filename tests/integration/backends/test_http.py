"""What the answers of an HTTP service mean, replies, headers and signatures, against a real server."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.errors import BackendRefused, BackendUnavailable
from gateway.forward.receipt import Receipt
from tests.support.backends import make_sink, message
from tests.support.servers import Certificates, HttpServer

SECRET = "a secret of sixteen and more"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    folder = tmp_path_factory.mktemp("http")
    with HttpServer(folder, Certificates(folder / "tls")) as server:
        yield server


def deliver(server: HttpServer, path: str, *messages: Any, **settings: Any) -> Receipt | None:
    async def run() -> Receipt | None:
        sink = make_sink({"kind": "http", "url": f"http://127.0.0.1:{server.port}{path}"} | settings)
        try:
            return await sink.deliver(messages or [message(1)])
        finally:
            await sink.close()

    return asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_come_again(server: HttpServer, status: int) -> None:
    with pytest.raises(BackendUnavailable, match=f"answers {status}") as caught:
        deliver(server, f"/status/{status}/7")
    assert caught.value.retry_after_s == 7


def test_retry_after_as_a_date(server: HttpServer) -> None:
    at = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100)).replace(" ", "%20")
    with pytest.raises(BackendUnavailable) as caught:
        deliver(server, f"/status/503/{at}")
    assert caught.value.retry_after_s == pytest.approx(100, abs=3)


@pytest.mark.parametrize(("value", "seconds"), [("soon", None), ("-5", None), ("99999999999999", 1e14 - 1)])
def test_retry_after_that_is_nonsense(server: HttpServer, value: str, seconds: float | None) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        deliver(server, f"/status/503/{value}")
    assert caught.value.retry_after_s == seconds  # the back-off waits five minutes at most


@pytest.mark.parametrize("status", [401, 403, 404, 405, 301, 307])
def test_for_the_operator(server: HttpServer, status: int) -> None:
    with pytest.raises(BackendUnavailable, match=f"answers {status}: ") as caught:
        deliver(server, f"/status/{status}")
    assert caught.value.retry_after_s is None


@pytest.mark.parametrize("status", [400, 409, 410, 413, 415, 422])
def test_refused(server: HttpServer, status: int) -> None:
    with pytest.raises(BackendRefused, match=f"answers {status}"):
        deliver(server, f"/status/{status}")
    receipt = deliver(server, f"/status/{status}", mode="binary")
    assert receipt is not None
    assert list(receipt.refused) == [0]


def test_one_poison_among_many(server: HttpServer) -> None:
    messages = [message(each, payload=b"poison" if each == 5 else b"good") for each in range(1, 11)]
    receipt = deliver(server, "/pick", *messages, mode="structured")
    assert receipt is not None
    assert list(receipt.refused) == [4]
    assert receipt.settled is None
    with pytest.raises(BackendRefused):
        deliver(server, "/pick", *messages)


@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_replies(server: HttpServer, mode: str) -> None:
    receipt = deliver(server, "/echo", message(1, payload=b"ping"), message(2, payload=b"pong"), mode=mode)
    assert receipt is not None
    assert b"ping" in receipt.replies[0]
    assert b"pong" in receipt.replies[1]


def test_a_reply_that_is_too_long(server: HttpServer) -> None:
    receipt = deliver(server, "/echo", message(1, payload=b"x" * 101), mode="binary", reply_bytes_max=100)
    assert receipt is not None
    assert "reply_bytes_max" in receipt.refused[0]


def test_the_signature_covers_who_sent_what_and_when(server: HttpServer) -> None:
    for mode in ("batch", "structured", "binary"):
        deliver(server, f"/open/{mode}", mode=mode, secret=SECRET)
        request = next(each for each in server.requests() if each["path"] == f"/open/{mode}")
        headers = {key.lower(): value for key, value in request["headers"].items()}
        at, _, digest = headers["x-pskgw-signature"].partition(",")
        lines = "".join(f"{key}:{headers[key]}\n" for key in sorted(headers) if key.startswith("ce-"))
        assert bool(lines) == (mode == "binary")
        signed = f"{at.removeprefix('t=')}.{lines}".encode() + request["body"].encode("latin-1")
        assert digest == "v1=" + hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
        assert abs(int(at.removeprefix("t=")) - time.time()) < 20


def test_headers_of_ones_own(server: HttpServer) -> None:
    headers = {"X-Site": "{label.site}", "X-Fixed": "yes"}
    deliver(server, "/open/headers", mode="binary", headers=headers, token="abc")
    (request,) = [each for each in server.requests() if each["path"] == "/open/headers"]
    assert request["headers"]["X-Site"] == "north"
    assert request["headers"]["X-Fixed"] == "yes"
    assert request["headers"]["Authorization"] == "Bearer abc"


def test_a_header_that_an_identity_would_break(server: HttpServer) -> None:
    bad = message(1, device="a\r\nX-Evil: 1")
    receipt = deliver(server, "/open/evil", bad, message(2), mode="binary", headers={"X-Device": "{device}"})
    assert receipt is not None
    assert list(receipt.refused) == [0]
    requests = [each for each in server.requests() if each["path"] == "/open/evil"]
    assert [each["headers"]["ce-device"] for each in requests] == ["meter-7"]


def test_odd_names_are_percent_encoded_in_attributes(server: HttpServer) -> None:
    deliver(server, "/open/odd", message(1, device='Zähler 7%"\r\n'), mode="binary")
    (request,) = [each for each in server.requests() if each["path"] == "/open/odd"]
    assert request["headers"]["ce-device"] == "Z%C3%A4hler%207%25%22%0D%0A"


def test_moods(server: HttpServer) -> None:
    """Alternately refusing and accepting: order and completeness within the session."""

    async def run() -> None:
        sink = make_sink(
            {"kind": "http", "url": f"http://127.0.0.1:{server.port}/mood/x", "mode": "structured"}
        )
        for number in range(1, 11):
            for status in ("503", "200"):
                server.mood_path.write_text(status)
                try:
                    receipt = await sink.deliver([message(number)])
                except BackendUnavailable:
                    assert status == "503"
                else:
                    assert status == "200"
                    assert receipt is None or not receipt.refused
        await sink.close()

    asyncio.run(run())
    assert len([each for each in server.requests() if each["path"] == "/mood/x"]) == 10
