"""How fast a sink publishes after the broker has refused for the moment."""

from gateway.forward.backends.publishing import Pace

WAITING = list(range(500))


def sizes(pace: Pace, outcomes: list[bool]) -> list[int]:
    """How many go at each try, when the tries end so."""
    found = []
    for well in outcomes:
        found.append(len(pace.first(WAITING)))
        pace.went(well=well)
    return found


def test_a_batch_goes_as_a_whole() -> None:
    assert Pace().first(WAITING) == WAITING
    assert sizes(Pace(), [True, True]) == [500, 500]


def test_after_a_refusal_one_goes_alone_until_it_is_taken() -> None:
    assert sizes(Pace(), [False, False, False, True, True, True]) == [500, 1, 1, 1, 2, 4]


def test_the_first_go_first() -> None:
    pace = Pace()
    pace.went(well=False)
    assert pace.first([7, 8, 9]) == [7]


def test_after_enough_successes_a_batch_goes_as_a_whole_again() -> None:
    assert sizes(Pace(), [False] + [True] * 11)[-2:] == [500, 500]
