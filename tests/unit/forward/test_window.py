from collections import deque

from gateway.forward.message import Message
from gateway.forward.window import MESSAGE_BYTES, Window
from tests.support.senders import Paused


def message(size: int) -> Message:
    return Message("default", "d", "d", None, "session", 1, 0.0, bytes(size))


SMALL = message(1)


def filled(window: Window, count: int) -> Window:
    for _ in range(count):
        assert window.add(SMALL)
    return window


def test_it_is_full_of_messages_however_small_they_are() -> None:
    window = Window(10, 1 << 20)
    was_full = []
    for _ in range(10):
        assert window.add(SMALL)
        was_full.append(window.is_full)
    window.remove(SMALL)
    was_full.append(window.is_full)
    assert was_full == [False] * 9 + [True, False]


def test_it_is_full_of_bytes_however_few_they_are() -> None:
    window = Window(10, 3 * (1000 + MESSAGE_BYTES))
    was_full = []
    for _ in range(3):
        assert window.add(message(1000))
        was_full.append(window.is_full)
    assert was_full == [False, False, True]


def test_what_was_taken_already_comes_all_the_same_up_to_twice_the_bytes() -> None:
    window = Window(2, 10 * (1 + MESSAGE_BYTES))
    filled(window, 20)
    assert not window.add(SMALL)
    window.remove(SMALL)
    assert window.add(SMALL)


def test_who_pauses_goes_on_when_half_is_free() -> None:
    window = filled(Window(10, 1 << 20), 10)
    resumed: list[int] = []
    window.when_free(Paused(lambda: resumed.append(window._messages)))
    for _ in range(10):
        window.remove(SMALL)
    assert resumed == [5]


def test_who_asks_when_half_is_free_goes_on_at_once() -> None:
    resumed: list[str] = []
    filled(Window(10, 1 << 20), 5).when_free(Paused(lambda: resumed.append("now")))
    assert resumed == ["now"]


def test_those_that_paused_go_on_in_turns() -> None:
    """Each adds four at a time, so there is never room for all of them; no one is left behind another's second turn."""
    window = filled(Window(10, 1 << 20), 10)
    turns: list[str] = []
    waiting: deque[Message] = deque([SMALL] * 10)

    class Sender:
        def __init__(self, name: str) -> None:
            self._name = name

        def route_is_free(self) -> None:
            turns.append(self._name)
            for _ in range(4):
                assert window.add(SMALL)
                waiting.append(SMALL)
            window.when_free(self)

    for name in "abc":
        window.when_free(Sender(name))
    most = 0
    for _ in range(100):
        window.remove(waiting.popleft())
        most = max(most, len(waiting))
    assert turns == list("abc" * (len(turns) // 3)) + list("abc")[: len(turns) % 3]
    assert len(turns) > 20
    assert most <= 10 + 3
