"""What is known of our own calls, against a model that keeps them all."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.calls import SETTLE_SECONDS, OpenCalls

events = st.lists(
    st.tuples(
        st.sampled_from(["call", "answer", "end", "report"]), st.integers(0, 9), st.integers(0, 99)
    ),
    max_size=60,
)


@given(events, st.floats(0.001, 0.5))
def test_counts_agree_with_a_list_of_calls(steps: list[tuple[str, int, int]], pace: float) -> None:
    calls, now, reported, waited = OpenCalls(), 0.0, float("-inf"), 0
    live: list[tuple[float, int, ExitStack, list[bool]]] = []  # sent, tokens, its end, answered
    handles = []
    for event, which, tokens in steps:
        now += pace
        if event == "call":
            stack = ExitStack()
            handles.append(stack.enter_context(calls.call(now, tokens)))
            live.append((now, tokens, stack, [False]))
        elif event == "report":
            calls.reported(now)
            reported = now
            waited = sum(t for s, t, _, a in live if not a[0] and s < reported - SETTLE_SECONDS)
        elif which < len(live):
            if event == "answer":
                handles[which].answered(now)
                live[which][3][0] = True
            else:
                handles.pop(which)
                live.pop(which)[2].close()
        own = calls.view(now)
        young = [c for c in live if c[0] >= reported - SETTLE_SECONDS]
        assert (own.open, own.unseen) == (len(live), len(young))
        assert own.unseen_waiting_tokens == sum(t for _, t, _, a in young if not a[0])
        assert own.waiting_tokens + own.unseen_waiting_tokens == sum(
            t for _, t, _, a in live if not a[0]
        )
        assert own.waited_tokens == waited
        assert own.oldest_seconds >= 0


def test_the_oldest_call_has_been_it_since_the_last_answer() -> None:
    calls = OpenCalls()
    with calls.call(1.0, 10) as first, calls.call(2.0, 20):
        own = calls.view(5.0)
        assert (own.oldest_tokens, own.oldest_seconds) == (10, pytest.approx(4.0))
        first.answered(4.0)
        own = calls.view(5.0)
        assert (own.oldest_tokens, own.oldest_seconds) == (20, pytest.approx(1.0))
    assert calls.view(6.0).oldest_tokens == 0
    assert len(calls) == 0
