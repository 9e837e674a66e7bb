"""The circuit breaker as a state machine, against a fake clock and a table of what it must do."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from diffship.runtimes.handoff.breaker import CLOSED, HALF_OPEN, OPEN, Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_opens_after_three_failures_in_a_row_and_admits_one_trial() -> None:
    clock = Clock()
    breaker = Breaker(3, 30, clock)
    for _ in range(3):
        assert breaker.state == CLOSED and breaker.allow()
        breaker.failed()
    assert breaker.state == OPEN and not breaker.allow() and breaker.wait() == 30
    clock.now += 29.9
    assert not breaker.allow()
    clock.now += 0.2
    assert breaker.state == HALF_OPEN and breaker.allow()
    assert not breaker.allow()  # one trial at a time
    breaker.succeeded()
    assert breaker.state == CLOSED and breaker.allow() and breaker.allow()


def test_a_failed_trial_opens_it_again_for_the_whole_time() -> None:
    clock = Clock()
    breaker = Breaker(1, 10, clock)
    breaker.failed()
    clock.now += 10
    assert breaker.allow()
    clock.now += 5
    breaker.failed()
    assert breaker.state == OPEN and breaker.wait() == 10


def test_successes_between_failures_keep_it_closed() -> None:
    breaker = Breaker(2, 10, Clock())
    for _ in range(5):
        breaker.failed()
        breaker.succeeded()
    assert breaker.state == CLOSED


def test_an_abandoned_trial_leaves_room_for_the_next() -> None:
    clock = Clock()
    breaker = Breaker(1, 10, clock)
    breaker.failed()
    clock.now += 10
    assert breaker.allow()
    breaker.abandoned()
    assert breaker.state == HALF_OPEN and breaker.allow()


@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=60), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_against_a_second_telling_of_the_rule(events: list[tuple[float, bool]], failures: int) -> None:
    """Whether it allows is decided here from the whole past: the failures in a row, and the last one's age."""
    clock = Clock()
    breaker = Breaker(failures, 10, clock)
    row, last = 0, 0.0
    for wait, good in events:
        clock.now += wait
        legal = row < failures or clock.now >= last + 10
        assert breaker.allow() == legal
        if legal:
            row, last = (0, last) if good else (row + 1, clock.now)
            (breaker.succeeded if good else breaker.failed)()
