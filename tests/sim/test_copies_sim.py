"""What copies beside a simulated sweep delay."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import simulate as command
from gpu_service.scheduling.plan import (
    DecodeRow,
    IterationPlan,
    Migration,
    Mode,
    PrefillRow,
    SubBatch,
    Tier,
)
from neo_plan.simulator.machine import Machine
from neo_plan.simulator.run import HealthyHostTier, SimulatedRunner

TOKENS = 16_000
NOWHERE = np.zeros(1, np.int32)


def make() -> Machine:
    return command.node_of(command.parser().parse_args(["--gpu-kv-blocks", "1650"])).machine()


def rows(gpu: int = 24, host: int = 0, chunk: int = 0) -> SubBatch:
    """Decode rows of 1,100 tokens, and a chunk."""
    decode = tuple(DecodeRow(i, 0, 1100, NOWHERE) for i in range(gpu + host))
    chunks = (PrefillRow(98, Tier.GPU, 0, (0,) * chunk, NOWHERE, True),) if chunk else ()
    return SubBatch(chunks, decode[:gpu], decode[gpu:])


def copying(it: IterationPlan, *, beside: bool = True) -> IterationPlan:
    """With a demotion of `TOKENS` tokens: 40 ms of the link."""
    move = Migration(99, Tier.HOST, TOKENS, NOWHERE, NOWHERE, beside=beside)
    return dataclasses.replace(it, migrations=(move,))


EMPTY = IterationPlan(1, Mode.INLINE, (), ())
GPU_ALONE = IterationPlan(1, Mode.INLINE, (), (rows(),))


@pytest.mark.parametrize(
    "it",
    [
        EMPTY,
        GPU_ALONE,
        IterationPlan(1, Mode.DEFERRED, (), GPU_ALONE.batches),
        IterationPlan(1, Mode.INLINE, (), (rows(host=4),)),
        IterationPlan(1, Mode.ASYMMETRIC, (), (rows(host=4), rows(0, host=4))),
    ],
    ids=["copies-alone", "gpu-only", "deferred", "inline", "asymmetric"],
)
def test_copies_beside_a_sweep_delay_the_next_one(
    monkeypatch: pytest.MonkeyPatch, it: IterationPlan
) -> None:
    """By what they take longer; and the sweep itself not at all."""
    machine = make()
    monkeypatch.setattr(machine, "host_ms", lambda _: 0.0)
    own = machine.sweep(it, ()).total if it is not EMPTY else 0.0
    copy_ms = machine.sweep(copying(EMPTY, beside=False), ()).total
    assert copy_ms == pytest.approx(
        1e-6 * TOKENS * 131072 / machine.profile.link.gbps.value, rel=0.02
    )
    beside = machine.sweep(copying(it), ())
    assert beside.total == pytest.approx(own)
    before = machine.sweep(copying(it, beside=False), ())
    assert before.total == pytest.approx(own + copy_ms)
    runner = SimulatedRunner(machine, 33, HealthyHostTier(100))
    for each in (copying(it), dataclasses.replace(GPU_ALONE, number=2)):
        runner.launch(each, {})
    first, second = runner.sweeps
    assert second.begin - first.begin == pytest.approx(1e-3 * copy_ms)
    assert first.end - first.begin == pytest.approx(1e-3 * own)


def test_copies_that_hide_delay_nobody() -> None:
    machine = make()
    runner = SimulatedRunner(machine, 33, HealthyHostTier(100))
    long = IterationPlan(1, Mode.INLINE, (), (rows(chunk=4000),))
    for each in (copying(long), dataclasses.replace(GPU_ALONE, number=2)):
        runner.launch(each, {})
    first, second = runner.sweeps
    assert second.begin == pytest.approx(first.end)
    assert first.time.total > first.time.link > 40


def test_the_link_and_the_hosts_attention_read_the_same_memory() -> None:
    """Each fits into the sweep of the other, and both together take longer."""
    machine = make()
    streamed = tuple(DecodeRow(i, 0, 1300, NOWHERE) for i in range(10, 13))
    under_way = [1100] * 33 * 8
    batch = SubBatch(streamed=streamed)
    alone = machine.sweep(IterationPlan(1, Mode.DEFERRED, (), (SubBatch(),)), under_way)
    both = machine.sweep(IterationPlan(1, Mode.DEFERRED, (), (batch,)), under_way)
    assert alone.total == pytest.approx(alone.cpu)
    assert both.link < both.cpu == alone.cpu
    assert both.gpu < both.cpu
    read = 1e-6 * 131072 * (sum(under_way) / 33 + 3 * 1300)
    assert both.total == pytest.approx(read / machine.profile.cpu.read_gbps.value)
    assert both.total > 1.15 * alone.total
