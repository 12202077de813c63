import getpass
import socket

import pytest

from gateway.registry.ledger import Author


def test_the_author_is_the_user_at_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    assert Author.of_process() == Author("alice", socket.gethostname())


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_a_user_without_a_name_is_unknown(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", fail)
    assert Author.of_process().actor == "unknown"
