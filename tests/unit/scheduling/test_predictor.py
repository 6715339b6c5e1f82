"""What a sweep is foretold to take, and what its time teaches, where KV is copied beside it."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import (
    DecodeRow,
    IterationPlan,
    Migration,
    Mode,
    SubBatch,
    SweepResult,
    Tier,
)
from gpu_service.scheduling.predictor import Predictor
from gpu_service.scheduling.rates import HostRates
from gpu_service.scheduling.state import SchedulerState
from gpu_service.scheduling.steering import Steering
from gpu_service.scheduling.work import ASYMMETRIC, GPU_ONLY, INLINE, SweepWork
from tests.support.fake_model import limits

RATES = HostRates(cpu_token_ms=1e-3, link_token_ms=0.01, streamed_token_ms=0.01, deferred_ms=0.5)
DECODE_MS = 4.7
COPY_MS = 30.0
BLOCKS = np.zeros(1, np.int32)


def steering() -> Steering:
    costs = SweepCosts({8: DECODE_MS}, {8: DECODE_MS}, 0.0)
    return Steering(SchedulerState(limits(copies_beside=True)), Predictor(costs, RATES))


def predictor_of(made: Steering) -> Predictor:
    assert made.predictor is not None
    return made.predictor


def plan(
    number: int,
    mode: Mode = Mode.INLINE,
    *,
    rows: bool = True,
    copy: bool = False,
    beside: bool = True,
    streamed: int = 0,
) -> IterationPlan:
    tokens = round(COPY_MS / RATES.link_token_ms)
    moves = (Migration(9, Tier.HOST, tokens, BLOCKS, BLOCKS, beside=beside),) if copy else ()
    stream = (DecodeRow(2, 5, streamed, BLOCKS),) if streamed else ()
    batch = SubBatch(gpu_decode=(DecodeRow(1, 5, 10, BLOCKS),), streamed=stream)
    return IterationPlan(number, mode, moves, (batch,) if rows else ())


def sweep(made: Steering, it: IterationPlan, device_ms: float, seconds: float = 0.0) -> None:
    made.launched(it)
    made.observe(it, SweepResult(device_seconds=1e-3 * device_ms), seconds)


@pytest.mark.parametrize("mode", [Mode.INLINE, Mode.DEFERRED])
def test_copies_that_outlast_their_sweep_teach_nothing_wrong(mode: Mode) -> None:
    """Each sweep takes what it was foretold to, and every other one has waited for a copy before
    that, once in a while for one beside no sweep at all."""
    made = steering()
    own = DECODE_MS + (RATES.deferred_ms if mode is Mode.DEFERRED else 0.0)
    for number in range(1, 400, 4):
        sweep(made, plan(number, mode, copy=True), own, 1e-3 * (own + 0.2))
        sweep(made, plan(number + 1, mode), own, 1e-3 * (COPY_MS + 0.2))
        sweep(made, plan(number + 2, rows=False, copy=True), 0.0, 1e-4)
        sweep(made, plan(number + 3, mode), own, 1e-3 * (COPY_MS + own + 0.2))
    known = predictor_of(made)
    assert msgspec.structs.asdict(known.rates) == pytest.approx(msgspec.structs.asdict(RATES))
    assert known.costs.decode_ms(8, 0) == pytest.approx(DECODE_MS)
    assert known.beside_ms(mode is Mode.DEFERRED) == pytest.approx(0.2)
    assert known.error == pytest.approx(0.0)
    assert made.accounts.predicted.total == pytest.approx(made.accounts.actual_ms)
    # The link has carried them all the same.
    assert made.accounts.predicted.link == pytest.approx(100 * COPY_MS)


def test_a_time_with_the_wait_in_it_is_left_out() -> None:
    """Of a runner that does not time the device."""
    made = steering()
    for number in range(1, 40, 2):
        sweep(made, plan(number, copy=True), 0.0, 1e-3 * DECODE_MS)
        sweep(made, plan(number + 1), 0.0, 2e-3 * DECODE_MS)
    assert predictor_of(made).costs.decode_ms(8, 0) == pytest.approx(DECODE_MS)
    sweep(made, plan(100), 0.0, 2e-3 * DECODE_MS)
    assert predictor_of(made).costs.decode_ms(8, 0) > DECODE_MS


def test_the_link_is_learnt_from_those_who_wait_for_it() -> None:
    """From migrations before a sweep, and streamed rows; not where copies beside it share it."""
    waited, streamed, shared = steering(), steering(), steering()
    tokens = round(2 * COPY_MS / RATES.link_token_ms)
    for number in range(1, 200):
        sweep(waited, plan(number, copy=True, beside=False), 2 * COPY_MS + DECODE_MS)
        sweep(streamed, plan(number, streamed=tokens), 3 * COPY_MS)
        sweep(shared, plan(number, streamed=tokens, copy=True), 3 * COPY_MS)
    made = [predictor_of(one).rates for one in (waited, streamed, shared)]
    links = [rates.link_token_ms for rates in made]
    assert links == pytest.approx([0.02, 0.01, 0.01], rel=0.02)
    links = [rates.streamed_token_ms for rates in made]
    assert links == pytest.approx([0.01, 0.015, 0.01], rel=0.02)


@pytest.mark.parametrize("way", [GPU_ONLY, INLINE, ASYMMETRIC])
def test_copies_beside_a_sweep_are_no_part_of_its_time(way: str) -> None:
    known = predictor_of(steering())
    work = SweepWork(way=way, decode=1, host_rows=1, host_tokens=100)
    alone = known.phases(work)
    copied = known.phases(dataclasses.replace(work, copied_tokens=3000, copies=1))
    assert copied.total == alone.total
    assert copied.gpu == alone.gpu
    assert copied.link == pytest.approx(alone.link + COPY_MS)


def test_a_first_iteration_that_compiles_does_not_count_for_ever() -> None:
    """Once everybody offloads there is no other iteration of the device alone to correct it."""
    known = Predictor(SweepCosts({8: 5.0}, {64: 6.0}, 0.0), RATES)
    known.observe_iteration(False, 2.0, 5e-3)
    for _ in range(20):
        known.observe_iteration(False, 5.1e-3, 5e-3)
    assert known.beside_ms(False) == pytest.approx(0.1)


def test_few_iterations_tell_nothing() -> None:
    known = Predictor(SweepCosts({8: 5.0}, {64: 6.0}, 0.0), RATES)
    for _ in range(3):
        known.observe_iteration(False, 2.0, 5e-3)
    assert known.beside_ms(False) == known.beside_ms(True) == 0
    for _ in range(20):
        known.observe_iteration(True, 5.3e-3, 5e-3)
    assert known.beside_ms(False) == known.beside_ms(True) == pytest.approx(0.3)
