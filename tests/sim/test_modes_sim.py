"""Offload mode auto: whatever is decided from iteration to iteration, tokens are the same and
nobody starves. That it pays is in `test_auto_pays.py`."""

from __future__ import annotations

import dataclasses
import math
import random

import msgspec
import pytest

from gpu_service.engine.messages import Submit
from gpu_service.offload.host_tier import HostTierState
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import IterationPlan, SweepResult, Tier
from gpu_service.scheduling.rates import HostRates
from gpu_service.scheduling.scheduler import Scheduler
from tests.support.fake_model import Machine, expected_output, limits, submit

WAYS = {
    "deferred": {
        "cohorts": 3, "cohort_rows": 4, "inline": False, "host_prefill": False,
        "copies_beside": True,
    },
    "staged": {
        "cohorts": 3, "cohort_rows": 4, "inline": False,
        "streamed_blocks": 20, "staged_prompts": True, "copies_beside": True,
    },
    "inline": {},
    "asymmetric": {"asymmetric": True},
    "all": {"cohorts": 3, "asymmetric": True, "streamed_blocks": 20},
}  # fmt: skip


def changed(rates: HostRates, **changes: float) -> HostRates:
    return msgspec.structs.replace(rates, **changes)


QUICK = HostRates(
    cpu_token_ms=1e-3, link_token_ms=1e-4, streamed_token_ms=1e-4, move_ms=0.01, deferred_ms=0.01
)


def costs() -> SweepCosts:
    return SweepCosts({1: 5.0, 32: 6.0}, {8: 5.2, 32: 6.5}, 0.001)


def workload(seed: int, count: int = 24) -> list[Submit]:
    draw = random.Random(seed)
    return [
        submit(
            f"r{i}", draw.randint(1, 40), draw.randint(1, 24), n=draw.choice((1, 1, 1, 2)),
            placement=draw.choice(("auto", "auto", "auto", "gpu_only", "cpu_preferred")),
        )
        for i in range(count)
    ]  # fmt: skip


def machine_of(
    way: str, rates: HostRates, *, look_ahead: bool = False, **changes: object
) -> Machine:
    bounds = limits(**{"auto": True, "gpu_blocks": 20, "host_blocks": 80, **WAYS[way], **changes})
    return Machine(Scheduler(bounds, costs(), rates), look_ahead=look_ahead)


def took(plan: IterationPlan, result: SweepResult) -> SweepResult:
    return dataclasses.replace(result, device_seconds=6e-3)


@pytest.mark.parametrize("way", ["deferred", "inline", "asymmetric"])
def test_what_nobody_has_measured_spoils_no_account(way: str) -> None:
    """A setting says how host rows run: the device's costs are known, the host's are not."""
    bounds = limits(**{"gpu_blocks": 20, "host_blocks": 80, **WAYS[way]})
    machine = Machine(Scheduler(bounds, costs()))
    for request in workload(1):
        machine.submit(request)
    while machine.scheduler.live_requests:
        machine.step(took)
    accounts = machine.scheduler.steering.accounts
    assert accounts.iterations[way] > 0
    assert accounts.actual_ms > 0
    assert math.isfinite(accounts.error)
    assert math.isfinite(accounts.predicted.total)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offload", ["auto", "always"])
@pytest.mark.parametrize("look_ahead", [False, True])
def test_every_request_gets_its_tokens_once(
    seed: int, way: str, offload: str, look_ahead: bool
) -> None:
    """Through outages, stalls, aborts and forced migrations, while the host's speed changes so much
    that modes flip."""
    draw = random.Random(seed)
    machine = machine_of(
        way, QUICK, look_ahead=look_ahead, offload=offload,
        force_migration_every=draw.choice((0, 0, 3)),
    )  # fmt: skip
    requests, gone = workload(seed), set()
    for request in requests:
        machine.submit(request)
    predictor = machine.scheduler.steering.predictor
    assert predictor is not None
    steps = 0
    while machine.scheduler.live_requests:
        steps += 1
        assert steps < 6000, "requests starve"
        machine.stalls = draw.random() < 0.03
        machine.host = HostTierState.DEGRADED if draw.random() < 0.05 else HostTierState.UP
        if steps % 30 == 0:
            slow = changed(QUICK, cpu_token_ms=draw.choice((1e-3, 1e-2, 10.0)))
            predictor.rates = slow
        machine.step(took)
        if draw.random() < 0.03:
            victim = draw.choice(requests).request_id
            machine.scheduler.abort(victim, None, machine.now)
            gone.add(victim)
    machine.check_empty()
    for request in requests:
        if request.request_id not in gone:
            for index in range(request.sampling.n):
                assert machine.outputs[request.request_id, index] == expected_output(request)
    batches = [batch for plan in machine.plans for batch in plan.batches]
    assert any(batch.host_decode or batch.streamed for batch in batches)


def shape(plan: IterationPlan) -> object:
    return [
        (
            [(r.key, r.tier, r.start, r.token_ids, r.blocks.tolist()) for r in b.prefill],
            [(r.key, r.length, r.blocks.tolist()) for r in b.gpu_decode],
            [(r.key, r.length) for r in (*b.host_decode, *b.streamed)],
        )
        for b in plan.batches
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", ["deferred", "inline", "asymmetric"])
def test_a_host_without_speed_gives_exactly_the_gpu_only_plan(seed: int, way: str) -> None:
    requests = [r for r in workload(seed, 20) if len(r.prompt_token_ids) < 30]
    plans = []
    for offload in ("never", "auto"):
        machine = machine_of(
            way, HostRates(cpu_token_ms=math.inf), offload=offload, auto=offload == "auto"
        )
        for request in requests:
            machine.submit(request)
        while machine.scheduler.live_requests:
            machine.step(took)
        plans.append([shape(plan) for plan in machine.plans])
        assert not any(plan.migrations for plan in machine.plans)
    assert plans[0] == plans[1]


def test_what_is_on_the_host_leaves_it_in_order_once_that_no_longer_pays() -> None:
    """Nobody younger gets the GPU's blocks first, and the host computes no more for them."""
    machine = machine_of("deferred", QUICK, host_blocks=200)
    for i in range(40):
        machine.submit(submit(f"r{i:02}", 12, 20, arrival=float(i)))
    for _ in range(60):
        machine.step(took)
    state = machine.scheduler.state
    there = state.running_on(Tier.HOST)
    assert len(there) > 4
    predictor = machine.scheduler.steering.predictor
    assert predictor is not None
    predictor.rates = changed(QUICK, cpu_token_ms=100.0)
    for _ in range(9 + 3):  # until it is noticed, and what is under way has landed
        machine.step(took)
    assert not state.flights
    left = [c.order for c in state.running_on(Tier.HOST)]
    assert left
    while left:
        before = {c.key for c in state.running}
        machine.step(took)
        started = [c for c in state.running if c.key not in before]
        assert all(c.order < left[0] for c in started), "somebody younger was let in first"
        left = [c.order for c in state.running_on(Tier.HOST)]
    machine.run()
    machine.check_empty()
    assert not any(batch.host_decode for plan in machine.plans[75:] for batch in plan.batches), (
        "rows of the host that it computes at a loss"
    )


def test_a_request_that_only_the_host_may_have_runs_there_at_any_speed() -> None:
    machine = machine_of("deferred", changed(QUICK, cpu_token_ms=50.0), host_prefill=True)
    machine.submit(submit("long", 90, 10))
    for i in range(10):
        machine.submit(submit(f"r{i}", 12, 20))
    machine.run()
    machine.check_empty()
    assert machine.usages["long"].host_tokens == 10
    assert sum(usage.host_tokens for usage in machine.usages.values()) == 10
