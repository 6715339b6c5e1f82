"""Asymmetric mode with a fake clock: any scheduling gives the same tokens, and sub-batches are what
the pipeline can run (the machine checks each plan)."""

from __future__ import annotations

import dataclasses
import random

import pytest

from gpu_service.engine.messages import Submit
from gpu_service.offload.host_tier import HostTierState
from gpu_service.scheduling.plan import IterationPlan, Mode, SubBatch, SweepResult, Tier
from gpu_service.scheduling.scheduler import Scheduler
from tests.support.fake_model import Machine, expected_output, limits, submit


def workload(seed: int, count: int) -> list[Submit]:
    draw = random.Random(seed)
    return [
        submit(
            f"r{i}",
            draw.randint(1, 40),
            draw.randint(1, 24),
            n=draw.choice((1, 1, 2)),
            placement=draw.choice(("auto", "auto", "gpu_only", "cpu_preferred")),
        )
        for i in range(count)
    ]


def machine_of(requests: list[Submit], **changes: object) -> Machine:
    machine = Machine(Scheduler(limits(**{"asymmetric": True, **changes})))
    for request in requests:
        machine.submit(request)
    return machine


def check_outputs(machine: Machine, requests: list[Submit]) -> None:
    machine.check_empty()
    assert not machine.refused
    for request in requests:
        for index in range(request.sampling.n):
            assert machine.outputs[request.request_id, index] == expected_output(request)


def modes(machine: Machine) -> set[Mode]:
    return {plan.mode for plan in machine.plans}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("offload", ["never", "auto", "always"])
@pytest.mark.parametrize("every", [0, 1, 3])
def test_every_request_gets_its_tokens_once(seed: int, offload: str, every: int) -> None:
    requests = workload(seed, 24)
    machine = machine_of(requests, offload=offload, force_migration_every=every)
    machine.run()
    check_outputs(machine, requests)
    # Forced migrations do not ask for the policy.
    assert (Mode.ASYMMETRIC in modes(machine)) == (offload != "never" or every > 0)


@pytest.mark.parametrize("budget", [1, 2, 5, 500])
def test_any_token_budget_works(budget: int) -> None:
    requests = workload(3, 10)
    machine = machine_of(requests, max_batch_tokens=budget)
    machine.run()
    check_outputs(machine, requests)


def test_both_sub_batches_give_the_host_as_much_to_read() -> None:
    requests = [submit(f"r{i}", 12 + i % 9, 60) for i in range(16)]
    machine = machine_of(requests, offload="always", host_blocks=400, max_batch_tokens=400)
    machine.run()
    pairs = [plan.batches for plan in machine.plans if plan.mode is Mode.ASYMMETRIC]
    assert len(pairs) >= 59
    for first, second in pairs:
        longest = max(row.length for row in (*first.host_decode, *second.host_decode))
        assert abs(host_tokens(first) - host_tokens(second)) <= longest


def host_tokens(batch: SubBatch) -> int:
    return sum(row.length for row in batch.host_decode)


def test_prompts_and_the_gpu_s_rows_are_in_the_first_sub_batch() -> None:
    requests = workload(8, 30)
    machine = machine_of(requests)
    machine.run()
    mixed = [p.batches for p in machine.plans if len(p.batches) == 2 and p.batches[0].gpu_decode]
    assert any(first.prefill and second.host_decode for first, second in mixed)
    assert any(first.host_decode for first, _ in mixed)


@pytest.mark.parametrize("seed", range(6))
def test_stalls_lost_migrations_outages_and_aborts_lose_nothing(seed: int) -> None:
    draw = random.Random(seed)
    requests = workload(seed + 40, 20)
    machine = machine_of(requests, force_migration_every=draw.choice((0, 4)))

    def spoil(plan: IterationPlan, result: SweepResult) -> SweepResult:
        """A stall voids the host rows of both sub-batches, and chunks that are half stored."""
        if draw.random() < 0.8:
            return result
        void = {row.key for batch in plan.batches for row in batch.host_decode}
        chunks = [row.key for b in plan.batches for row in b.prefill if row.tier is Tier.HOST]
        void.update(key for key in chunks if draw.random() < 0.5)
        lost = frozenset(move.key for move in plan.migrations if draw.random() < 0.5)
        kept = {k: t for k, t in result.tokens.items() if k not in void and k not in lost}
        return dataclasses.replace(result, tokens=kept, void=frozenset(void - lost), lost=lost)

    aborted = set()
    for _ in range(3000):
        if not machine.scheduler.live_requests:
            break
        machine.host = HostTierState.DEGRADED if draw.random() < 0.1 else HostTierState.UP
        machine.step(spoil)
        if draw.random() < 0.05:
            victim = draw.choice(requests).request_id
            machine.scheduler.abort(victim, draw.choice((None, 0, 1)), machine.now)
            aborted.add(victim)
    assert Mode.ASYMMETRIC in modes(machine)
    check_outputs(machine, [r for r in requests if r.request_id not in aborted])
