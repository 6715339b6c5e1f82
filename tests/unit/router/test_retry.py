"""Retries stay within what the router does anyway."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.retry import MIN_RETRIES, WINDOW_SECONDS, RetryBudget, pause_seconds


def take(budget: RetryBudget, now: float, wanted: int) -> int:
    return sum(budget.take(now) for _ in range(wanted))


def test_every_open_call_may_be_tried_once_more() -> None:
    """One of two backends dies and takes half of the calls along."""
    budget = RetryBudget(0.0)
    for _ in range(400):
        budget.began(5.0)
    assert take(budget, 5.0, 200) == 200


def test_when_everything_fails_load_grows_by_the_ratio() -> None:
    budget = RetryBudget(0.2)
    granted = 0
    for number in range(1000):
        now = number / 100
        budget.began(now)
        granted += take(budget, now, 2)
        budget.ended()
    assert granted <= 1000 * 0.2 + MIN_RETRIES + 1


def test_a_quiet_router_may_retry_and_the_window_forgets() -> None:
    budget = RetryBudget(0.0)
    assert take(budget, 1.0, 100) == MIN_RETRIES
    assert take(budget, 1.0 + WINDOW_SECONDS / 2, 100) == 0
    assert take(budget, 1.1 + WINDOW_SECONDS, 100) == MIN_RETRIES


@given(
    st.lists(st.tuples(st.sampled_from("cet"), st.floats(0.0, 3.0)), max_size=200),
    st.sampled_from([0.0, 0.2, 1.0]),
)
def test_the_bound_holds_at_any_time(events: list[tuple[str, float]], ratio: float) -> None:
    """c: a call comes, e: one ends, t: one wants another try."""
    budget, now, open_calls = RetryBudget(ratio), 0.0, 0
    calls: list[float] = []
    retries: list[float] = []
    for event, pause in events:
        now += pause
        if event == "c":
            budget.began(now)
            calls.append(now)
            open_calls += 1
        elif event == "e" and open_calls:
            budget.ended()
            open_calls -= 1
        elif event == "t" and budget.take(now):
            # The window is made of whole tenths: it is between 9 and 10 of them long.
            recent = [t for t in retries if t > now - 0.9 * WINDOW_SECONDS]
            longest = [t for t in calls if t >= now - WINDOW_SECONDS]
            assert len(recent) < len(longest) * ratio + open_calls + MIN_RETRIES
            retries.append(now)


@given(st.integers(1, 2000), st.floats(0, 1, exclude_max=True))
def test_pauses_are_bounded(retry: int, draw: float) -> None:
    pause = pause_seconds(min(retry, 60), 0.01, 0.25, draw=lambda: draw)
    assert 0 <= pause <= min(0.25, 0.01 * 2 ** min(retry - 1, 60))
