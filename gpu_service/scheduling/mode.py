"""How the next iterations run: the device alone, or with host rows, how many of them, and how.

Each way is judged by the tokens that it decodes in a millisecond of the long run, in which every
choice that ends makes room for another, whose prompt has to be computed:

    rate = rows / time        rows: GPU decode + streamed + host rows that end in a sweep
    time = sum over sweeps with small and with larger chunks of prompts, as many as it takes to
           compute them as fast as choices end: device with exchange, and what the host or the
           link takes longer; and a share of the migrations that it takes to get there

Prompts count, by the time that they take, and every candidate computes as many of them a token.
The device alone is a candidate like the others. It wins where the host is slow, where nobody
waits, and where so few wait that a cohort has less than a row (a host row takes as many sweeps as
there are layers): the exchange then costs more than it brings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpu_service.scheduling.decision import Decision
from gpu_service.scheduling.demand import Demand
from gpu_service.scheduling.limits import SchedulerLimits
from gpu_service.scheduling.predictor import Predictor
from gpu_service.scheduling.work import ASYMMETRIC, DEFERRED, GPU_ONLY, INLINE, SweepWork

LEAST_GAIN = 0.01
"""Offloading begins where it promises more than this, or more than the predictor is known to be off
by: a smaller gain is not known to be one. It ends where it promises none."""


_HOST_ALONE = "some may be on the host tier alone"


@dataclass(frozen=True)
class Ways:
    """What this engine can do."""

    deferred: bool
    inline: bool
    asymmetric: bool


def ways_of(limits: SchedulerLimits) -> Ways:
    return Ways(limits.cohorts > 0, limits.inline, limits.asymmetric)


def decide(
    demand: Demand,
    predictor: Predictor,
    limits: SchedulerLimits,
    before: Decision,
    must_offload: bool,
) -> Decision:
    """The way that promises most. `before`: what held until now. `must_offload`: some choices can
    be on the host tier alone, and have to go on."""
    alone = _judge(Decision(), demand, predictor, limits)
    alone = replace(alone, gpu_only_rate=alone.rate)
    if not demand.queued and not must_offload:
        return replace(alone, why="all fit on the GPU tier")
    if must_offload:
        # Also the last ones, with nobody queued: they may be too large for the GPU tier.
        demand = replace(demand, host_choices=max(1, demand.host_choices))
    candidates = list(_candidates(demand, predictor, limits))
    if not candidates:
        return replace(alone, why="the host tier has room for nobody, or nobody may go there")
    best = max(
        (_judge(candidate, demand, predictor, limits) for candidate in candidates),
        key=lambda decision: decision.rate,
    )
    best = replace(best, gpu_only_rate=alone.rate)
    margin = 0.0 if before.offloads else max(LEAST_GAIN, predictor.error)
    if best.rate > (1 + margin) * alone.rate:
        gain = best.rate / alone.rate - 1 if alone.rate else 0.0
        return replace(best, why=f"{best.way} promises {gain:.1%} more than the GPU alone")
    if must_offload:
        return replace(best, resident_tokens=0.0, why=_HOST_ALONE)
    gain = best.rate / alone.rate - 1 if alone.rate else 0.0
    return replace(alone, why=f"{best.way}, the best with the host, promises {gain:.1%}")


def _candidates(
    demand: Demand, predictor: Predictor, limits: SchedulerLimits
) -> Iterator[Decision]:
    """Ways with so many rows; what one costs is judged elsewhere."""
    ways, most = ways_of(limits), float(demand.host_choices)
    if most < 1:
        return
    for streamed in _streamed(demand, limits, most):
        left = most - streamed
        if streamed:
            yield Decision(streamed_rows=streamed)
        if ways.deferred and left > 0:
            bound = left / limits.cohorts
            if limits.cohort_rows:
                bound = min(bound, float(limits.cohort_rows))
            for rows in _steps(bound):
                yield Decision(DEFERRED, rows, streamed)
        for way in (INLINE,) * ways.inline + (ASYMMETRIC,) * ways.asymmetric:
            for rows in _steps(left):
                if rows >= 1:
                    yield Decision(way, rows, streamed)


def _streamed(demand: Demand, limits: SchedulerLimits, most: float) -> list[float]:
    """None, and quarters of what staging holds."""
    room = min(limits.streamed_blocks * limits.block_tokens / demand.host_context, most)
    return [0.0] if room < 1 else [quarters * room / 4 for quarters in range(5)]


def _steps(bound: float) -> Iterator[float]:
    """Numbers of rows up to `bound`, by quarters of a row while there are few, then by eighths of
    them: as averages of unequal sweeps they need not be whole."""
    rows = 1.0
    while rows < bound:
        yield rows
        rows += max(0.25, rows / 8)
    yield bound


def _judge(
    candidate: Decision, demand: Demand, predictor: Predictor, limits: SchedulerLimits
) -> Decision:
    """With its rate, and what follows from its rows."""
    if not demand.choices:
        return candidate
    tokens = candidate.host_rows * demand.host_context
    rows = demand.gpu_rows + candidate.streamed_rows + candidate.host_rows
    sweeps = limits.cohorts if candidate.way == DEFERRED else 1
    moves = 0.0
    if candidate.offloads and not limits.host_prefill:
        moves = _moves_ms(candidate, demand, predictor, sweeps)
    before, beside = (0.0, moves) if limits.copies_beside else (moves, 0.0)
    most = limits.captured_rows if candidate.offloads else 0
    time = before + _time(candidate, demand, predictor, rows, beside, most)
    streamed = candidate.streamed_rows * demand.host_context
    return replace(
        candidate,
        host_tokens=tokens,
        streamed_tokens=streamed,
        resident_tokens=tokens * sweeps + streamed,
        rate=rows / time if time else 0.0,
        sweep_ms=time,
    )


def _moves_ms(candidate: Decision, demand: Demand, predictor: Predictor, sweeps: int) -> float:
    """A sweep's share of moving choices to the host tier that are not there yet, and of moving them
    back if the queue will not last until they end."""
    rows = candidate.host_rows + candidate.streamed_rows
    new = rows - demand.on_host / sweeps
    if new <= 0:
        return 0.0
    # Sweeps until nobody waits, and so tokens that such a choice decodes until then.
    lasts = demand.waiting * demand.output / (demand.gpu_rows + rows)
    decoded = max(1.0, min(demand.output, lasts / sweeps))
    moves = 2 if decoded < demand.output else 1
    rates = predictor.rates
    return new / decoded * moves * (demand.context * rates.link_token_ms + rates.move_ms)


def _time(
    candidate: Decision,
    demand: Demand,
    predictor: Predictor,
    rows: float,
    moves_ms: float,
    most_rows: int,
) -> float:
    """Of a sweep, on average over those with chunks and those without. `moves_ms`: of migrations
    beside it. `most_rows`: of one with a chunk; 0: any."""
    decode = demand.gpu_rows + candidate.streamed_rows
    host = candidate.host_rows
    asymmetric = candidate.way == ASYMMETRIC
    work = SweepWork(
        way=candidate.way,
        decode=decode,
        context=decode * demand.context,
        host_rows=host,
        host_tokens=host * demand.host_context,
        second_rows=host if asymmetric else 0.0,
        second_tokens=host * demand.host_context if asymmetric else 0.0,
        link_tokens=candidate.streamed_rows * demand.host_context,
        streamed=candidate.streamed_rows > 0,
    )
    prompts = rows * demand.prompt_per_token
    chunks = predictor.costs.chunks_for(max(1, round(decode)), prompts, most_rows)
    parts = [(share, predictor.phases(replace(work, chunk_rows=chunk))) for share, chunk in chunks]
    time = sum(share * phases.total for share, phases in parts)
    if candidate.way in (GPU_ONLY, DEFERRED):
        device = sum(share * phases.gpu for share, phases in parts)
        other = max(max(phases.cpu, moves_ms + phases.link) for _, phases in parts)
        time = predictor.hidden_ms(device, other)
    else:
        time = max(time, moves_ms + max(phases.link for _, phases in parts))
    return time + predictor.beside_ms(candidate.offloads)
