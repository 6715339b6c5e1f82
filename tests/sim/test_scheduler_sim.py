"""Event simulation of the scheduler with a fake clock and a machine that checks every plan."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from gpu_service.engine.messages import Submit
from gpu_service.offload.host_tier import HostTierState
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import IterationPlan, Mode, SweepResult, Tier
from gpu_service.scheduling.scheduler import Scheduler
from tests.support.fake_model import Machine, expected_output, limits, submit, token_at


def workload(seed: int, count: int, longest: int = 40) -> list[Submit]:
    draw = random.Random(seed)
    return [
        submit(
            f"r{i}",
            draw.randint(1, longest),
            draw.randint(1, 24),
            arrival=0.0,
            n=draw.choice((1, 1, 1, 2, 3)),
            placement=draw.choice(("auto", "auto", "gpu_only", "cpu_preferred")),
            priority=draw.choice((0, 0, 0, 1)),
        )
        for i in range(count)
    ]


def run_all(requests: list[Submit], *, look_ahead: bool = False, **changes: object) -> Machine:
    machine = Machine(Scheduler(limits(**changes)), look_ahead=look_ahead)
    for request in requests:
        machine.submit(request)
    machine.run()
    machine.check_empty()
    return machine


def check_outputs(machine: Machine, requests: list[Submit]) -> None:
    for request in requests:
        for index in range(request.sampling.n):
            key = (request.request_id, index)
            assert machine.outputs[key] == expected_output(request)
            assert machine.finished[key] == "length"
        usage = machine.usages[request.request_id]
        tokens = request.sampling.max_tokens * request.sampling.n
        assert usage.completion_tokens == tokens
        assert usage.gpu_tokens + usage.host_tokens == tokens


COHORTS = (0, 1, 3, 9)
"""0: host rows are part of one sweep; else they take as many."""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("offload", ["never", "auto", "always"])
@pytest.mark.parametrize("cohorts", COHORTS)
def test_every_request_gets_its_tokens_once(seed: int, offload: str, cohorts: int) -> None:
    requests = workload(seed, 24)
    machine = run_all(requests, offload=offload, cohorts=cohorts)
    assert not machine.refused
    check_outputs(machine, requests)
    deferred = any(plan.mode is Mode.DEFERRED for plan in machine.plans)
    assert deferred == (cohorts > 0 and offload != "never")


def test_cohorts_share_the_host_s_work() -> None:
    """Once all run, each sweep starts about as many tokens of KV as another."""
    requests = [submit(f"r{i}", 12 + i % 9, 60) for i in range(16)]
    machine = run_all(requests, offload="always", cohorts=4, host_blocks=400, max_batch_tokens=400)
    started = [
        sum(row.length for batch in plan.batches for row in batch.host_decode)
        for plan in machine.plans
    ]
    steady = started[8:-30]
    assert len(steady) > 100
    for one, next_one in itertools.pairwise(steady):
        assert 0.75 < one / next_one < 1.33, steady


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("offload", ["never", "auto"])
@pytest.mark.parametrize("gpu_blocks", [16, 20, 60])
def test_deciding_ahead_of_results_changes_no_token(
    seed: int, offload: str, gpu_blocks: int
) -> None:
    requests = workload(seed, 24)
    machine = run_all(requests, look_ahead=True, offload=offload, gpu_blocks=gpu_blocks)
    assert machine.looked_ahead > (40 if offload == "never" else 0)
    check_outputs(machine, requests)


def test_deciding_ahead_computes_no_token_that_cannot_be_used() -> None:
    """Ends by length are known in advance; only ends by a token cost a row."""
    requests = [submit(f"r{i}", 9, 5 + i % 7) for i in range(12)]
    machine = run_all(requests, look_ahead=True, offload="never", gpu_blocks=64)
    rows = sum(len(batch.gpu_decode) for plan in machine.plans for batch in plan.batches)
    assert rows == sum(request.sampling.max_tokens - 1 for request in requests)


def test_a_row_behind_the_end_of_its_choice_is_dropped() -> None:
    """The end-of-sequence token is heard of one iteration late."""
    requests = [submit(f"r{i}", 9 + i, 20) for i in range(6)]
    ends = {token_at(r.prompt_token_ids, len(r.prompt_token_ids) + 4) for r in requests}
    machine = run_all(requests, look_ahead=True, eos_token_ids=frozenset(ends))
    for request in requests:
        expected = expected_output(request)
        stop = next(i for i, token in enumerate(expected) if token in ends)
        assert machine.outputs[request.request_id, 0] == expected[: stop + 1]
        assert machine.finished[request.request_id, 0] == "stop"


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("cohorts", COHORTS)
def test_forced_migration_changes_no_token(every: int, cohorts: int) -> None:
    requests = workload(7, 16)
    machine = run_all(requests, force_migration_every=every, cohorts=cohorts)
    check_outputs(machine, requests)
    moved = sum(machine.scheduler.state.migrations.values())
    assert moved > len(machine.plans) // (4 * max(every, cohorts))


@pytest.mark.parametrize("budget", [1, 2, 5, 24, 500])
@pytest.mark.parametrize("cohorts", [0, 5])
def test_any_token_budget_works(budget: int, cohorts: int) -> None:
    requests = workload(3, 10)
    check_outputs(run_all(requests, max_batch_tokens=budget, cohorts=cohorts), requests)


@pytest.mark.parametrize("gpu_blocks", [13, 14, 40])
@pytest.mark.parametrize("host_blocks", [0, 13, 100])
@pytest.mark.parametrize("cohorts", [0, 5])
def test_any_pool_that_holds_the_longest_request_works(
    gpu_blocks: int, host_blocks: int, cohorts: int
) -> None:
    requests = [r for r in workload(5, 14, 28) if r.sampling.n == 1]
    pools = {"gpu_blocks": gpu_blocks, "host_blocks": host_blocks}
    check_outputs(run_all(requests, cohorts=cohorts, **pools), requests)


def test_a_gpu_pool_smaller_than_a_prompt_serves_it_from_the_host() -> None:
    request = submit("long", 60, 10)
    machine = run_all([request], gpu_blocks=4, host_blocks=20)
    check_outputs(machine, [request])
    assert machine.usages["long"].host_tokens == 10


def plan_shape(plan: IterationPlan) -> object:
    return [
        (
            [(r.key, r.tier, r.start, r.token_ids, r.blocks.tolist()) for r in b.prefill],
            [(r.key, r.length, r.blocks.tolist()) for r in b.gpu_decode],
            [(r.key, r.length) for r in b.host_decode],
        )
        for b in plan.batches
    ]


@pytest.mark.parametrize("seed", range(3))
def test_no_host_blocks_gives_exactly_the_gpu_only_plan(seed: int) -> None:
    requests = workload(seed, 20, 24)
    never = run_all(requests, offload="never", host_blocks=64)
    empty = run_all(requests, offload="auto", host_blocks=0)
    assert [plan_shape(p) for p in never.plans] == [plan_shape(p) for p in empty.plans]
    assert not any(p.migrations for p in empty.plans)


@pytest.mark.parametrize("seed", range(4))
def test_more_host_memory_never_lowers_throughput(seed: int) -> None:
    """With equally fast tiers. The last iterations are ragged: a percent is noise."""
    draw = random.Random(seed)
    requests = [submit(f"r{i}", draw.randint(8, 32), draw.randint(8, 40)) for i in range(60)]
    times = [
        run_all(requests, host_blocks=blocks, max_running=64, max_batch_tokens=128).now
        for blocks in (0, 18, 36, 72, 144)
    ]
    for less, more in itertools.pairwise(times):
        assert more <= 1.01 * less, times
    assert times[-1] < 0.6 * times[0], times


def test_first_come_first_served_within_a_priority() -> None:
    requests = [submit(f"r{i}", 16, 8, arrival=float(i)) for i in range(12)]
    machine = run_all(requests, offload="never")
    starts = [machine.first_token[r.request_id] for r in requests]
    assert starts == sorted(starts)


def test_higher_priority_overtakes_the_queue() -> None:
    machine = Machine(Scheduler(limits(offload="never")))
    for i in range(12):
        machine.submit(submit(f"low{i}", 24, 16, arrival=float(i)))
    machine.step()
    machine.submit(submit("high", 24, 4, arrival=50.0, priority=5))
    machine.run()
    later = [t for r, t in machine.first_token.items() if r != "high"]
    assert sum(t < machine.first_token["high"] for t in later) <= 3


def test_a_stream_of_short_requests_does_not_starve_a_long_one() -> None:
    machine = Machine(Scheduler(limits(host_blocks=0, gpu_blocks=20)))
    for i in range(4):
        machine.submit(submit(f"early{i}", 12, 12, arrival=0.0))
    machine.submit(submit("long", 60, 8, arrival=1.0))
    for i in range(200):
        machine.submit(submit(f"s{i}", 4, 4, arrival=2.0 + i))
        machine.step()
        if ("long", 0) in machine.finished:
            break
    assert ("long", 0) in machine.finished


@pytest.mark.parametrize("seed", range(3))
def test_promotion_and_demotion_do_not_ping_pong(seed: int) -> None:
    """A choice that was demoted stays away until the GPU's choices have grown or ended."""
    draw = random.Random(seed)
    requests = [submit(f"r{i}", draw.randint(8, 24), 60) for i in range(20)]
    machine = run_all(requests, gpu_blocks=64, host_blocks=256, max_running=64)
    moves: dict[int, list[tuple[int, Tier]]] = {}
    for plan in machine.plans:
        for move in plan.migrations:
            moves.setdefault(move.key, []).append((plan.number, move.target))
    for history in moves.values():
        assert len(history) <= 4, history
        for (first, a), (second, b) in itertools.pairwise(history):
            if a is Tier.GPU and b is Tier.HOST:
                assert second - first >= 8, "demoted again right after its promotion"


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cohorts", [0, 4])
def test_random_aborts_leave_nothing_behind(seed: int, look_ahead: bool, cohorts: int) -> None:
    draw = random.Random(seed)
    requests = workload(seed + 50, 30)
    bounds = limits(force_migration_every=draw.choice((0, 3)), cohorts=cohorts)
    machine = Machine(Scheduler(bounds), look_ahead=look_ahead)
    waiting, aborted = list(requests), set()
    while waiting or machine.scheduler.live_requests:
        for _ in range(draw.randint(0, 2)):
            if waiting:
                machine.submit(waiting.pop(0))
        machine.step()
        if draw.random() < 0.4:
            victim = draw.choice(requests)
            index = draw.choice((None, 0, 1, 2))
            machine.scheduler.abort(victim.request_id, index, machine.now)
            machine.scheduler.state.check_integrity()
            aborted.add(victim.request_id)
    machine.check_empty()
    untouched = [r for r in requests if r.request_id not in aborted]
    assert untouched
    check_outputs(machine, untouched)


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cohorts", [0, 4])
def test_stalls_lost_migrations_and_outages_lose_nothing(
    seed: int, look_ahead: bool, cohorts: int
) -> None:
    """Void rows are repeated, lost KV is computed again, and choices on the host wait out an
    outage."""
    draw = random.Random(seed)
    requests = workload(seed + 90, 20)
    bounds = limits(force_migration_every=draw.choice((0, 4)), cohorts=cohorts)
    machine = Machine(Scheduler(bounds), look_ahead=look_ahead)
    for request in requests:
        machine.submit(request)

    def spoil(plan: IterationPlan, result: SweepResult) -> SweepResult:
        keys = [r.key for b in plan.batches for r in b.host_decode]
        lost = frozenset(m.key for m in plan.migrations if draw.random() < 0.3)
        if draw.random() < 0.8 and not lost:
            return result
        if plan.mode is Mode.DEFERRED:
            keys = []  # `machine.stalls` spoils those, and rows of earlier plans
        return dataclasses.replace(
            result,
            tokens={k: t for k, t in result.tokens.items() if k not in keys and k not in lost},
            void=result.void | frozenset(keys),
            lost=lost,
        )

    for _ in range(3000):
        if not machine.scheduler.live_requests:
            break
        machine.host = HostTierState.DEGRADED if draw.random() < 0.1 else HostTierState.UP
        machine.stalls = draw.random() < 0.1
        machine.step(spoil)
    machine.check_empty()
    assert not machine.refused
    check_outputs(machine, requests)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("offload", ["auto", "always"])
@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("abort", [0.0, 0.3])
def test_prompts_on_the_gpu_alone(seed: int, offload: str, look_ahead: bool, abort: float) -> None:
    """As CUDA sweeps have it: choices get to the host by demotion, and decisions run ahead of what
    is under way there."""
    draw = random.Random(seed)
    requests = workload(seed + 130, 24)
    bounds = limits(
        offload=offload,
        cohorts=4,
        cohort_rows=2,
        host_prefill=False,
        host_blocks=60,
        gpu_blocks=20,
        force_migration_every=draw.choice((0, 1, 3)),
        copies_beside=draw.choice((False, True)),
    )
    costs = SweepCosts({1: 1.0, 32: 2.0}, {8: 2.0, 32: 4.0}, 0.001)
    machine = Machine(Scheduler(bounds, costs), look_ahead=look_ahead)
    for request in requests:
        machine.submit(request)
    aborted = set()
    while machine.scheduler.live_requests:
        machine.step(lambda plan, result: dataclasses.replace(result, device_seconds=5e-3))
        if draw.random() < abort:
            victim = draw.choice(requests)
            machine.scheduler.abort(victim.request_id, None, machine.now)
            aborted.add(victim.request_id)
    machine.check_empty()
    check_outputs(machine, [r for r in requests if r.request_id not in aborted])
    batches = [batch for plan in machine.plans for batch in plan.batches]
    assert all(chunk.tier is Tier.GPU for batch in batches for chunk in batch.prefill)
    assert max(len(batch.host_decode) for batch in batches) in (1, 2)
    if look_ahead:
        assert machine.looked_ahead > 0.9 * len(machine.plans) - 10


def test_the_host_takes_what_the_gpu_has_no_room_for() -> None:
    requests = [submit(f"r{i}", 24, 40) for i in range(30)]
    bounds = limits(
        cohorts=4, host_prefill=False, host_blocks=200, gpu_blocks=40, max_batch_tokens=64
    )
    offloading = Machine(Scheduler(bounds), look_ahead=True)
    for request in requests:
        offloading.submit(request)
    offloading.run()
    alone = run_all(requests, look_ahead=True, offload="never", gpu_blocks=40, max_batch_tokens=64)
    check_outputs(offloading, requests)
    assert offloading.now < 0.9 * alone.now
    moves = sum(len(plan.migrations) for plan in offloading.plans)
    assert moves < 2 * len(requests), "ping-pong"
