"""Rows that attend on the device over the KV on the host: who they are, and their tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest

from gpu_service.engine.messages import Submit
from gpu_service.offload.host_tier import HostTierState
from gpu_service.scheduling.plan import Mode, SubBatch
from gpu_service.scheduling.scheduler import Scheduler
from tests.support.fake_model import Machine, expected_output, limits, submit

MODES = [
    {"cohorts": 0},
    {"cohorts": 4},
    {"cohorts": 4, "cohort_rows": 2, "host_prefill": False},
    {"cohorts": 4, "cohort_rows": 2, "staged_prompts": True},
]


def workload(seed: int, count: int = 20) -> list[Submit]:
    draw = random.Random(seed)
    return [
        msgspec.structs.replace(
            submit(f"r{i}", draw.randint(1, 30), draw.randint(1, 24)),
            tpot_ms=draw.choice((None, None, 1.0)),
        )
        for i in range(count)
    ]


def batches(machine: Machine) -> Iterator[SubBatch]:
    return (batch for plan in machine.plans for batch in plan.batches)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_gets_its_tokens_once(
    seed: int, look_ahead: bool, mode: dict[str, object]
) -> None:
    draw = random.Random(seed)
    bounds = limits(
        streamed_blocks=draw.choice((6, 20)),
        host_blocks=60,
        gpu_blocks=20,
        force_migration_every=draw.choice((0, 1, 3)),
        **mode,
    )
    machine = Machine(Scheduler(bounds), look_ahead=look_ahead)
    requests, gone = workload(seed), set()
    for request in requests:
        machine.submit(request)
    while machine.scheduler.live_requests:
        machine.stalls = draw.random() < 0.05
        machine.host = HostTierState.DEGRADED if draw.random() < 0.1 else HostTierState.UP
        machine.step()
        if draw.random() < 0.05:
            victim = draw.choice(requests).request_id
            machine.scheduler.abort(victim, None, machine.now)
            gone.add(victim)
    machine.check_empty()
    for request in requests:
        if request.request_id not in gone:
            assert machine.outputs[request.request_id, 0] == expected_output(request)
    assert any(batch.streamed for batch in batches(machine))


def test_a_choice_changes_between_the_link_and_the_host() -> None:
    """Streamed in one sweep, the host's in another, never both."""
    machine = Machine(Scheduler(limits(streamed_blocks=12, cohorts=3, offload="always")))
    for i in range(6):
        machine.submit(submit(f"r{i}", 8 + i, 20))
    while machine.scheduler.live_requests:
        machine.step()
    streamed = {row.key for batch in batches(machine) for row in batch.streamed}
    host = {row.key for batch in batches(machine) for row in batch.host_decode}
    assert streamed & host
    assert {plan.mode for plan in machine.plans} == {Mode.INLINE, Mode.DEFERRED}


@pytest.mark.parametrize("seed", range(3))
def test_without_streamed_blocks_nobody_is(seed: int) -> None:
    machine = Machine(Scheduler(limits(offload="always")))
    for request in workload(seed):
        machine.submit(request)
    while machine.scheduler.live_requests:
        machine.step()
    assert not any(batch.streamed for batch in batches(machine))
