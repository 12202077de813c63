"""The few sessions that keep large buffers."""

from gateway.server.sessions.bulk import BULK_SESSIONS_MAX, BulkSessions
from tests.unit.tls.test_session import TLS12, Policy, connect, converse, keys_of


def test_as_many_as_there_may_be_keep_their_buffers() -> None:
    """One more makes the first one small again, and it works as before."""
    pairs = [connect(TLS12, keys_of(), Policy()) for _ in range(BULK_SESSIONS_MAX + 1)]
    bulk, kept = BulkSessions(), []
    for client, server in pairs:
        bulk.add(server)
        assert server._engine is not None
        kept.append(server._engine._into_ssl)
        client.send(bytes(50_000))
        server.send(bytes(50_000))
        converse(client, server)
    now = [server._engine._into_ssl for _, server in pairs if server._engine is not None]
    assert now[0] != kept[0]
    assert now[1:] == kept[1:]
    for client, server in pairs:
        bulk.discard(server)
        client.send(b"still works")
        assert converse(client, server)[1] == [b"still works"]
    assert not bulk.sessions
    now = [server._engine._into_ssl for _, server in pairs if server._engine is not None]
    assert all(one != other for one, other in zip(now, kept, strict=True))


def test_what_is_not_transmitted_yet_is_not_lost() -> None:
    """Made small again between two calls, a session still has what was written."""
    client, server = connect(TLS12, keys_of(), Policy())
    bulk = BulkSessions()
    bulk.add(server)
    server.send(b"x" * 40_000)
    bulk.discard(server)
    got = [event for event in converse(client, server)[0] if isinstance(event, bytes)]
    assert b"".join(got) == b"x" * 40_000
