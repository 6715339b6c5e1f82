"""The choice of a backend, from snapshots alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policies import choose as choose_by
from router.policies.pressure import least_pressure, pressure
from router.views import BackendState, BackendView, CallView, LoadView

LOAD = LoadView(
    total_tokens=16_000, used_tokens=0, running_requests=0, waiting_requests=0,
    waiting_prompt_tokens=0, max_waiting_requests=64,
)  # fmt: skip


def backend(address: str, **changes: object) -> BackendView:
    """An idle UP one; `changes` are fields of the view or of its load."""
    load = {k: v for k, v in changes.items() if k in LoadView.__dataclass_fields__}
    rest = {k: v for k, v in changes.items() if k not in load}
    idle = BackendView(address, BackendState.UP, replace(LOAD, **load), in_flight=0, unseen=0)  # type: ignore[arg-type]
    return replace(idle, **rest)  # type: ignore[arg-type]


def choose(backends: Sequence[BackendView], tried: Collection[str] = ()) -> str | None:
    return choose_by(least_pressure, backends, CallView(), tried)


def test_the_least_used_kv_wins() -> None:
    assert choose([backend("a", used_tokens=900), backend("b", used_tokens=800)]) == "b"


def test_room_is_relative_to_size() -> None:
    small = backend("small", total_tokens=1_000, used_tokens=500)
    big = backend("big", total_tokens=100_000, used_tokens=10_000)
    assert choose([small, big]) == "big"


def test_waiting_prompts_count() -> None:
    assert choose([backend("a", waiting_prompt_tokens=500), backend("b", used_tokens=400)]) == "b"


def test_waiting_requests_count_as_average_ones_when_their_prompts_are_short() -> None:
    queued = backend(
        "a", used_tokens=4000, running_requests=4, waiting_requests=3, waiting_prompt_tokens=3
    )
    assert pressure(queued) == pytest.approx((4000 + 3000) / 16_000)


def test_up_before_suspect_and_never_the_others() -> None:
    suspect = backend("suspect", state=BackendState.SUSPECT)
    busy = backend("busy", used_tokens=15_999)
    down = backend("down", state=BackendState.DOWN)
    draining = backend("draining", state=BackendState.DRAINING)
    assert choose([suspect, busy, down, draining]) == "busy"
    assert choose([suspect, down, draining]) == "suspect"
    assert choose([down, draining]) is None
    assert choose([]) is None


def test_tried_ones_are_left_out() -> None:
    assert choose([backend("a"), backend("b", used_tokens=9)], tried=["a"]) == "b"
    assert choose([backend("a")], tried=["a"]) is None


def test_a_full_queue_comes_last_but_is_still_tried() -> None:
    full = backend("full", waiting_requests=60, unseen=4)
    assert choose([full, backend("busy", used_tokens=15_999)]) == "busy"
    assert choose([full]) == "full"


def test_no_bound_on_the_queue_is_never_full() -> None:
    endless = backend("endless", waiting_requests=10_000, max_waiting_requests=0)
    assert choose([endless, backend("b", used_tokens=16_000, waiting_requests=64)]) == "endless"


def test_ties_go_to_fewer_own_calls_then_to_the_order() -> None:
    assert choose([backend("a", in_flight=2), backend("b", in_flight=1)]) == "b"
    assert choose([backend("b"), backend("a")]) == "b"


@given(st.integers(1, 6), st.integers(0, 60))
def test_a_burst_between_two_snapshots_spreads(count: int, calls: int) -> None:
    """Equal backends, no news in between: calls differ by at most one."""
    views = {name: backend(name) for name in "abcdef"[:count]}
    for _ in range(calls):
        chosen = choose(list(views.values()))
        assert chosen is not None
        views[chosen] = replace(
            views[chosen],
            in_flight=views[chosen].in_flight + 1,
            unseen=views[chosen].unseen + 1,
        )
    sent = Counter({name: view.in_flight for name, view in views.items()})
    assert sum(sent.values()) == calls
    assert max(sent.values()) - min(sent.values()) <= 1


@given(
    st.lists(
        st.builds(
            BackendView,
            address=st.uuids().map(str),
            state=st.sampled_from(BackendState),
            load=st.none()
            | st.builds(LoadView, *(st.integers(0, 1000) for _ in LoadView.__dataclass_fields__)),
            in_flight=st.integers(0, 100),
            unseen=st.integers(0, 100),
        ),
        max_size=6,
    )
)
def test_any_usable_backend_means_a_choice(backends: list[BackendView]) -> None:
    chosen = choose(backends)
    usable = [b for b in backends if b.state in (BackendState.UP, BackendState.SUSPECT)]
    assert (chosen is not None) == bool(usable)
    if any(b.state is BackendState.UP for b in usable):
        assert next(b for b in usable if b.address == chosen).state is BackendState.UP
