"""Admission against a model that keeps every ticket, with a clock of the test's own."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from neo_common.errors import Reason
from router.admission import cost
from router.admission.core import AdmissionCore
from router.admission.policy import Policy, PriorityClass, SharedLimits, TenantLimits
from router.admission.rates import Bucket
from router.admission.tickets import Refusal, State, Ticket

NAMES = ("a", "b", "c", "d")
REASONS = (Reason.RATE_LIMITED, Reason.QUEUE_FULL, Reason.WAIT_TOO_LONG)
LIMITS = st.builds(
    TenantLimits,
    weight=st.sampled_from([0.5, 1.0, 4.0]),
    max_running=st.integers(0, 3),
    max_queued=st.integers(0, 4),
    tokens_per_minute=st.sampled_from([0.0, 600.0]),
    requests_per_minute=st.sampled_from([0.0, 60.0]),
    max_class=st.sampled_from(["low", "normal", "high"]),
)
POLICIES = st.builds(
    Policy,
    st.builds(
        SharedLimits,
        max_running=st.integers(0, 5),
        max_queued=st.integers(0, 8),
        max_wait_seconds=st.sampled_from([3.0, 30.0]),
    ),
    LIMITS,
    st.dictionaries(st.sampled_from(NAMES), LIMITS),
)


class Admissions(RuleBasedStateMachine):
    """`told` is what a handler knows: the tickets that it must still hear of, run, or end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.core = AdmissionCore(Policy())
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.policy_changed = False

    @initialize(policy=POLICIES)
    def begin(self, policy: Policy) -> None:
        self.core = AdmissionCore(policy)

    def turn(self, room: float = math.inf) -> None:
        for ticket in self.core.turn(self.now, room):
            assert ticket in self.waiting, "told twice, or never queued"
            self.waiting.remove(ticket)
            if ticket.state is State.RUNNING:
                assert self.now < ticket.expires
                self.running.append(ticket)
            else:
                assert ticket.state is State.REFUSED
                assert ticket.refusal is not None
                assert ticket.refusal.retry_after > 0
        assert self.core.next_expiry() > self.now
        for ticket in self.waiting:  # whoever waits could not have run
            assert ticket.state is State.WAITING
            limits = self.core.policy.of(ticket.tenant.name)
            bound = self.core.policy.shared.max_running
            assert (
                room < 1
                or (bound and len(self.running) >= bound)
                or (limits.max_running and self.of(ticket, self.running) >= limits.max_running)
                or room < math.inf
            )

    def of(self, ticket: Ticket, tickets: list[Ticket]) -> int:
        return sum(other.tenant.name == ticket.tenant.name for other in tickets)

    @rule(
        name=st.sampled_from(NAMES),
        rank=st.sampled_from(PriorityClass),
        tokens=st.integers(1, 900),
        left=st.sampled_from([math.inf, 5.0, 0.5, 0.0]),
        room=st.sampled_from([math.inf, 0.0]),
    )
    def come(self, name: str, rank: PriorityClass, tokens: int, left: float, room: float) -> None:
        ticket = refusal = None
        try:
            ticket = self.core.submit(name, rank, tokens, self.now, seconds_left=left, room=room)
        except Refusal as error:
            refusal = error
        if ticket is None:
            assert refusal is not None
            assert refusal.reason in REASONS
            assert 0 < refusal.retry_after <= 60
            self.turn(room)
            return
        assert ticket.rank <= self.core.policy.of(name).highest
        if ticket.state is State.RUNNING:
            assert room >= 1
            self.running.append(ticket)
        else:
            self.waiting.append(ticket)
        self.turn(room)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), used=st.sampled_from([None, 0.0, 5.0, 2000.0]))
    def finish(self, data: st.DataObject, used: float | None) -> None:
        ticket = data.draw(st.sampled_from(self.running))
        self.running.remove(ticket)
        self.core.end(ticket, self.now, used)
        self.core.end(ticket, self.now, used)  # a second time is for nothing
        self.turn()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(ticket)
        self.core.end(ticket, self.now)
        self.turn()

    @rule(seconds=st.sampled_from([0.01, 1.0, 2.9, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.turn()
        assert all(ticket.expires > self.now for ticket in self.waiting)

    @rule(policy=POLICIES)
    def reload(self, policy: Policy) -> None:
        self.core.configure(policy, self.now)
        self.policy_changed = bool(self.running or self.waiting)
        self.turn()

    @invariant()
    def counts_agree(self) -> None:
        core = self.core
        assert core.running == len(self.running)
        assert core.waiting == len(self.waiting)
        for ticket in self.waiting + self.running:
            tenant = ticket.tenant
            assert tenant.running == self.of(ticket, self.running)
            assert tenant.waiting == self.of(ticket, self.waiting)
        assert sum(len(f.waiting) for f in core._backlogged) == len(self.waiting)
        assert core._queued_load == pytest.approx(sum(t.load for t in self.waiting))
        assert len(core._expiries) <= 2 * len(self.waiting) + 65
        assert len(core._tenants) <= len(NAMES)

    @invariant()
    def bounds_hold(self) -> None:
        """Those of the policy under which everything came; a new one is not for the past."""
        if self.policy_changed:
            if self.running or self.waiting:
                return
            self.policy_changed = False
        shared = self.core.policy.shared
        assert not shared.max_running or len(self.running) <= shared.max_running
        assert len(self.waiting) <= shared.max_queued
        for ticket in self.waiting + self.running:
            limits = self.core.policy.of(ticket.tenant.name)
            assert not limits.max_running or self.of(ticket, self.running) <= limits.max_running
            assert not limits.max_queued or self.of(ticket, self.waiting) <= limits.max_queued


TestAdmissions = Admissions.TestCase
TestAdmissions.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


def served(
    policy: Policy, costs: dict[tuple[str, PriorityClass], int], starts: int
) -> list[Ticket]:
    """The order in which requests start, all flows always having some waiting, one running at a
    time."""
    core, now = AdmissionCore(policy), 0.0
    blocker = core.submit("blocker", PriorityClass.LOW, 1, now)
    for (name, rank), tokens in costs.items():
        for _ in range(3):
            core.submit(name, rank, tokens, now)
    core.end(blocker, now)
    order: list[Ticket] = []
    for _ in range(starts):
        now += 0.001
        (ticket,) = core.turn(now)
        assert ticket.state is State.RUNNING
        order.append(ticket)
        core.submit(ticket.tenant.name, ticket.rank, ticket.cost, now)
        core.end(ticket, now)
    return order


@given(
    st.dictionaries(
        st.sampled_from(NAMES),
        st.tuples(st.sampled_from([0.5, 1.0, 2.0, 8.0]), st.integers(1, 50)),
        min_size=2,
    )
)
@settings(max_examples=60, deadline=None)
def test_tenants_share_by_weight(flows: dict[str, tuple[float, int]]) -> None:
    """At every moment two tenants' tokens per weight differ by at most a request of each: the bound
    of start-time fair queueing."""
    tenants = {name: TenantLimits(weight=weight) for name, (weight, _) in flows.items()}
    shared = SharedLimits(max_running=1, max_queued=1000, max_wait_seconds=1e6)
    costs = {(name, PriorityClass.NORMAL): tokens for name, (_, tokens) in flows.items()}
    got: Counter[str] = Counter()
    for ticket in served(Policy(shared, TenantLimits(), tenants), costs, 300):
        got[ticket.tenant.name] += round(ticket.cost)
        for a, (weight_a, cost_a) in flows.items():
            for b, (weight_b, cost_b) in flows.items():
                bound = cost_a / weight_a + cost_b / weight_b
                assert got[a] / weight_a - got[b] / weight_b <= bound + 1e-6


def test_classes_share_by_weight_and_none_starves() -> None:
    shared = SharedLimits(max_running=1, max_queued=1000, max_wait_seconds=1e6)
    costs = {("a", rank): 10 for rank in PriorityClass} | {("b", PriorityClass.HIGH): 10}
    order = served(Policy(shared), costs, 2100)
    by_class = Counter(ticket.rank for ticket in order)
    assert by_class[PriorityClass.HIGH] == pytest.approx(1600, rel=0.02)
    assert by_class[PriorityClass.NORMAL] == pytest.approx(400, rel=0.02)
    assert by_class[PriorityClass.LOW] == pytest.approx(100, rel=0.02)
    high = Counter(t.tenant.name for t in order if t.rank is PriorityClass.HIGH)
    assert abs(high["a"] - high["b"]) <= 2
    assert order[0].rank is PriorityClass.HIGH


def test_who_asks_one_by_one_gains_nothing() -> None:
    """A tenant with one request at a time gets no more than its share from one that floods."""
    core = AdmissionCore(Policy(SharedLimits(max_running=1, max_queued=1000, max_wait_seconds=1e6)))
    running = core.submit("flood", PriorityClass.NORMAL, 10, 0.0)
    for _ in range(500):
        core.submit("flood", PriorityClass.NORMAL, 10, 0.0)
    got: Counter[str] = Counter()
    drip: Ticket | None = None
    for step in range(400):
        now = step * 0.01
        if drip is None:
            drip = core.submit("drip", PriorityClass.NORMAL, 10, now)
        core.end(running, now)
        (running,) = core.turn(now)
        got[running.tenant.name] += 1
        if running is drip:
            drip = None
    assert got["drip"] == pytest.approx(200, abs=3)


def test_who_was_away_has_saved_up_nothing() -> None:
    core = AdmissionCore(Policy(SharedLimits(max_running=1, max_queued=1000, max_wait_seconds=1e6)))
    running = core.submit("busy", PriorityClass.NORMAL, 10, 0.0)
    got: Counter[str] = Counter()
    for step in range(400):
        now = step * 0.01
        for name in ("busy", "late") if step >= 300 else ("busy",):
            core.submit(name, PriorityClass.NORMAL, 10, now)
        core.end(running, now)
        (running,) = core.turn(now)
        got[running.tenant.name] += step >= 300
    assert abs(got["busy"] - got["late"]) <= 2


def test_a_bucket_saves_up_no_more_than_a_burst() -> None:
    bucket = Bucket(1.0, 10.0, 0.0)
    assert bucket.wait(10.0, 1000.0) == 0
    bucket.take(10.0, 1000.0)
    assert bucket.wait(1.0, 1000.0) == pytest.approx(1.0)


def test_who_reserves_more_than_it_uses_gets_its_share_of_what_is_used() -> None:
    """Both use 100 tokens a request; one asks for 40 times as much, as many clients do."""
    shared = SharedLimits(max_running=4, max_queued=1000, max_wait_seconds=1e6)
    core, now = AdmissionCore(Policy(shared)), 0.0
    reserved = {"modest": 100, "greedy": 4000}
    running: list[Ticket] = []
    for name, tokens in reserved.items():
        for _ in range(10):
            ticket = core.submit(name, PriorityClass.NORMAL, tokens, now)
            if ticket.state is State.RUNNING:
                running.append(ticket)
    started: Counter[str] = Counter()
    for step in range(1000):
        now += 0.01
        done = running.pop(0)
        core.end(done, now, used=100.0)
        name = done.tenant.name
        core.submit(name, PriorityClass.NORMAL, reserved[name], now)
        for ticket in core.turn(now):
            running.append(ticket)
            if step >= 500:  # when it has learnt
                started[ticket.tenant.name] += 1
    assert started["greedy"] == pytest.approx(started["modest"], rel=0.05)


@given(st.sampled_from(sorted(cost.KINDS)), st.binary(max_size=300))
def test_any_bytes_have_a_cost(path: str, data: bytes) -> None:
    shared = SharedLimits()
    asked = cost.asked(path, data, (), shared)
    assert 1 <= asked.cost.total(shared) <= 300 + 16 * shared.max_output_tokens
    cost.used(path, asked.cost.choices, data)


def test_memory_is_bounded_whatever_names_come() -> None:
    core = AdmissionCore(Policy(default=TenantLimits(tokens_per_minute=60.0)))
    for number in range(10_000):
        ticket = core.submit(f"t{number}", PriorityClass.NORMAL, 10, number * 0.001)
        core.end(ticket, number * 0.001)
    assert len(core._tenants) <= 4097
    assert len(core._idle) <= 4097


@given(
    per_second=st.floats(0.1, 1000),
    burst=st.floats(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 20), st.floats(0.1, 1500)), min_size=1, max_size=60),
)
def test_a_bucket_lets_through_its_rate_and_one_burst(
    per_second: float, burst: float, steps: list[tuple[float, float]]
) -> None:
    bucket, now, taken, largest = Bucket(per_second, burst, 0.0), 0.0, 0.0, 0.0
    for passed, amount in steps:
        now += passed
        wait = bucket.wait(amount, now)
        if wait == 0:
            bucket.take(amount, now)
            taken += amount
            largest = max(largest, amount)
            assert taken <= burst + per_second * now + max(0.0, largest - burst) + 1e-3
        else:
            assert bucket.wait(amount, now + wait + 1e-6) == 0, "the delay that is told is enough"
