"""The choice of a backend, from snapshots alone: what holds for every policy."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.policies import POLICIES, Policy
from router.policies import choose as choose_by
from router.policies.candidates import candidates, queue_is_full
from router.policies.pressure import least_pressure, pressure
from router.policies.simple import power_of_two, round_robin, two_of
from router.policies.wait import predicted_wait
from router.views import BackendState, BackendView, CallView, TierView
from tests.support.views import calls, view, views

USABLE = (BackendState.UP, BackendState.SUSPECT)
few = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
every = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def choose(backends: Sequence[BackendView], tried: Collection[str] = ()) -> str | None:
    return choose_by(least_pressure, backends, CallView(), tried)


# Every policy ---------------------------------------------------------------------------------


@few
@given(backends=views(), call=calls(), tried=st.sets(st.integers(0, 7)))
def test_one_is_chosen_wherever_one_can_be_tried(
    backends: list[BackendView], call: CallView, tried: set[int]
) -> None:
    """And never one that is DOWN, DRAINING or has been tried; SUSPECT and full ones come last."""
    away = {backends[n].address for n in tried if n < len(backends)}
    usable = [b for b in backends if b.state in USABLE and b.address not in away]
    for policy in POLICIES.values():
        chosen = choose_by(policy, backends, call, away)
        assert (chosen is not None) == bool(usable)
        if chosen is None:
            continue
        (taken,) = [b for b in usable if b.address == chosen]
        up = [b for b in usable if b.state is BackendState.UP]
        assert taken.state is BackendState.UP or not up
        alike = [b for b in usable if b.state is taken.state]
        assert not queue_is_full(taken) or all(map(queue_is_full, alike))


@few
@given(backends=views(), call=calls(), others=views(), other=calls())
def test_the_choice_follows_from_what_is_seen_alone(
    backends: list[BackendView], call: CallView, others: list[BackendView], other: CallView
) -> None:
    """Asked again, about copies, after other questions, it says the same."""
    for policy in POLICIES.values():
        said = choose_by(policy, backends, call)
        choose_by(policy, others, other)
        assert choose_by(policy, copy.deepcopy(backends), copy.deepcopy(call)) == said


@few
@given(backends=views(), call=calls())
def test_with_room_means_a_queue_that_is_not_full(
    backends: list[BackendView], call: CallView
) -> None:
    able = {b.address for b in backends if b.state in USABLE and not queue_is_full(b)}
    for policy in POLICIES.values():
        chosen = choose_by(policy, backends, call, with_room=True)
        assert chosen in able if able else chosen is None


@every
@few
@given(st.integers(1, 6), st.integers(1, 60), st.randoms(use_true_random=False))
def test_a_burst_between_two_snapshots_spreads(
    policy: Policy, count: int, burst: int, draw: random.Random
) -> None:
    """Equal backends, no news in between: nobody gets more than what the policy promises."""
    backends = {name: view(name) for name in "abcdef"[:count]}
    for turn in range(burst):
        call = CallView(
            512, session=draw.choice((b"", b"1", b"2")), prefix=(b"1",),
            known=(draw.choice("abcdef"),), turn=turn, chance=draw.random(),
        )  # fmt: skip
        chosen = choose_by(policy, list(backends.values()), call)
        assert chosen is not None
        backends[chosen] = one_more(backends[chosen])
    sent = [backend.own.open for backend in backends.values()]
    assert sum(sent) == burst
    if policy in (least_pressure, round_robin):
        assert max(sent) - min(sent) <= 1
    elif policy is not power_of_two:  # that depends on the draws
        assert max(sent) <= max(5, 1 + 1.25 * (burst + 1) / count)


def one_more(backend: BackendView) -> BackendView:
    """A call of 512 tokens was sent to it a moment ago."""
    own = backend.own
    tokens = own.unseen_waiting_tokens + 512
    now = replace(own, open=own.open + 1, unseen=own.unseen + 1, unseen_waiting_tokens=tokens)
    return replace(backend, own=now)


# Which are candidates -------------------------------------------------------------------------


def test_up_before_suspect_and_never_the_others() -> None:
    suspect = view("suspect", state=BackendState.SUSPECT)
    busy = view("busy", used_tokens=15_999)
    down = view("down", state=BackendState.DOWN)
    draining = view("draining", state=BackendState.DRAINING)
    assert choose([suspect, busy, down, draining]) == "busy"
    assert choose([suspect, down, draining]) == "suspect"
    assert choose([down, draining]) is None
    assert choose([]) is None


def test_tried_ones_are_left_out() -> None:
    assert choose([view("a"), view("b", used_tokens=9)], tried=["a"]) == "b"
    assert choose([view("a")], tried=["a"]) is None


def test_a_full_queue_comes_last_but_is_still_tried() -> None:
    full = view("full", waiting_requests=60, unseen=4)
    assert choose([full, view("busy", used_tokens=15_999)]) == "busy"
    assert choose([full]) == "full"
    assert candidates([full], with_room=True) == []


def test_no_bound_on_the_queue_is_never_full() -> None:
    endless = view("endless", waiting_requests=10_000, max_waiting_requests=0)
    assert choose([endless, view("b", used_tokens=16_000, waiting_requests=64)]) == "endless"


# KV pressure ----------------------------------------------------------------------------------


def test_the_least_used_kv_wins() -> None:
    assert choose([view("a", used_tokens=900), view("b", used_tokens=800)]) == "b"


def test_room_is_relative_to_size_and_both_tiers_count() -> None:
    small = view("small", total_tokens=1_000, used_tokens=500)
    big = view("big", total_tokens=100_000, used_tokens=10_000)
    assert choose([small, big]) == "big"
    host = TierView(total_tokens=84_000, used_tokens=500)
    assert pressure(view("both", used_tokens=500, host=host)) == pytest.approx(0.01)


def test_waiting_prompts_count() -> None:
    assert choose([view("a", waiting_prompt_tokens=500), view("b", used_tokens=400)]) == "b"


def test_waiting_requests_count_as_average_ones_when_their_prompts_are_short() -> None:
    queued = view(
        "a", used_tokens=4000, running_requests=4, waiting_requests=3, waiting_prompt_tokens=3
    )
    assert pressure(queued) == pytest.approx((4000 + 3000) / 16_000)


def test_ties_go_to_fewer_own_calls_then_to_the_order() -> None:
    assert choose([view("a", open=2), view("b", open=1)]) == "b"
    assert choose([view("b"), view("a")]) == "b"


# Those that look at little --------------------------------------------------------------------


@given(views(state=st.just(BackendState.UP)), st.floats(0, 1, exclude_max=True), calls())
def test_of_two_the_better_one(backends: list[BackendView], chance: float, call: CallView) -> None:
    if not backends:
        return
    first, second = two_of(backends, chance)
    assert (first is second) == (len(backends) == 1)
    chosen = power_of_two(backends, replace(call, chance=chance))
    assert chosen in (first, second)
    waits = [predicted_wait(backend, call) for backend in (first, second)]
    assert predicted_wait(chosen, call) == min(waits)


def test_two_are_drawn_by_their_room() -> None:
    """4 : 2 : 1 : 1, as often as a draw without putting back says."""
    backends = [view(str(n), total_tokens=room) for n, room in enumerate((4000, 2000, 1000, 1000))]
    pairs = Counter(two_of(backends, (n + 0.5) / 10_000) for n in range(10_000))
    first, second = Counter[str](), Counter[str]()
    for (one, two), count in pairs.items():
        first[one.address] += count
        if one.address == "0":
            second[two.address] += count
    shares = [first[str(n)] / 10_000 for n in range(4)]
    assert shares == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.01)
    assert second["1"] == pytest.approx(2 * second["2"], rel=0.01)


def test_each_in_turn_whatever_the_order_of_the_views() -> None:
    backends = [view(name) for name in "cab"]
    order = [round_robin(backends, CallView(turn=turn)).address for turn in range(6)]
    assert order == ["a", "b", "c"] * 2
    assert round_robin(backends[::-1], CallView(turn=1)).address == "b"
