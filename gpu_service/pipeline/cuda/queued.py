"""Sweeps that have been queued on a CUDA device, and what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gpu_service.model.sampling import SamplingRow
from gpu_service.pipeline.cuda.host_side import HostSide, HostSweep
from gpu_service.pipeline.cuda.inputs import SweepShape
from gpu_service.pipeline.cuda.logprobs import SweepLogprobs
from gpu_service.pipeline.results import nothing_to_draw
from gpu_service.scheduling.plan import Flight, SampledToken, SubBatch, SweepResult


@dataclass(frozen=True)
class Arriving:
    """A host row that comes through the last layer in this sweep and may draw."""

    length: int
    """Tokens attended."""
    place: int
    """Its row of the sweep's logits."""


def arriving_rows(
    batch: SubBatch,
    beside: HostSweep | None,
    shape: SweepShape,
    sampling: Mapping[int, SamplingRow],
) -> dict[int, Arriving]:
    """By choice: those that still run. One with a row of its own in a deferred sweep began anew
    since. `batch`: the first sub-batch."""
    if beside is None:
        return {}
    if beside.finishing is None:
        firsts = shape.sequences, shape.sequences + shape.host
        return {
            row.key: Arriving(row.length, place)
            for rows, first in zip(beside.inputs.lanes, firsts, strict=False)
            for place, row in enumerate(rows, first)
        }
    busy = {chunk.key for chunk in batch.prefill}
    busy |= {row.key for row in (*batch.gpu_decode, *batch.streamed)}
    cohort = beside.finishing
    lengths = cohort.tables.lengths.tolist()
    return {
        flight.key: Arriving(length, place)
        for place, (flight, length) in enumerate(
            zip(cohort.flights, lengths, strict=True), shape.sequences
        )
        if flight.key not in busy and flight.key in sampling
    }


@dataclass(frozen=True)
class Beside:
    """The host's part of a queued sweep."""

    side: HostSide
    sweep: HostSweep | None
    """None if the host was away; deferred sweeps alone run then."""
    status: torch.Tensor
    arriving: Mapping[int, Arriving]

    def outcome(self) -> HostOutcome:
        """Once the device has come to the sweep's end."""
        here = None if self.sweep is None else self.side.landed(self.sweep, self.status)
        waited = self.sweep is not None and self.sweep.finishing is None
        if here is None:
            return HostOutcome(self.side.lose(), {}, frozenset(self.arriving if waited else ()))
        landed = {flight.key for flight in here}
        drew = {k: row.place for k, row in self.arriving.items() if waited or k in landed}
        return HostOutcome(here, drew, frozenset())


@dataclass(frozen=True)
class HostOutcome:
    """What became of a sweep's host rows."""

    landed: tuple[Flight, ...]
    """Deferred ones that are under way no more."""
    drew: Mapping[int, int]
    """Choice -> its row of the sweep's tokens."""
    void: frozenset[int]
    """Choices whose rows, not deferred ones, are to be repeated."""


class QueuedSweep:
    """A sweep whose tokens are on their way to the host."""

    def __init__(
        self,
        events: tuple[torch.cuda.Event, torch.cuda.Event] | None,
        landing: torch.Tensor,
        indices: dict[int, int],
        sampling: Mapping[int, SamplingRow],
        logprobs: SweepLogprobs,
        lost: frozenset[int],
        void: frozenset[int],
        host: Beside | None,
    ) -> None:
        """void: host rows that were left out."""
        self._sampling = sampling
        self._events = events
        self._landing = landing
        self._indices = indices
        self._logprobs = logprobs
        self._lost = lost
        self._void = void
        self._host = host

    @property
    def is_done(self) -> bool:
        """Never asked for again once it is: it stays in flight until the next one is launched."""
        return False

    def result(self) -> SweepResult:
        device_seconds, waiting = 0.0, time.perf_counter()
        if self._events is not None:
            begin, end = self._events
            end.synchronize()
            device_seconds = 1e-3 * float(begin.elapsed_time(end))
        waited = time.perf_counter() - waiting
        ids: list[int] = self._landing.tolist()
        drawn = {key: ids[index] for key, index in self._indices.items()}
        host = self._host.outcome() if self._host else HostOutcome((), {}, frozenset())
        drawn.update((key, ids[place]) for key, place in host.drew.items())
        logprobs = self._logprobs.of_tokens(drawn)
        return SweepResult(
            tokens={k: SampledToken(t, logprobs.get(k)) for k, t in drawn.items() if t >= 0},
            void=self._void | host.void,
            lost=self._lost,
            failed={k: nothing_to_draw(self._sampling.get(k)) for k, t in drawn.items() if t < 0},
            landed=host.landed,
            prompt_logprobs=self._logprobs.of_prompts(),
            device_seconds=device_seconds,
            waited_seconds=waited,
        )
