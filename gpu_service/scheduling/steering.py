"""The decision about modes from iteration to iteration: what it is made from, what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gpu_service.offload.host_tier import HostWork
from gpu_service.scheduling import balance
from gpu_service.scheduling.decision import Decision
from gpu_service.scheduling.demand import demand_of
from gpu_service.scheduling.mode import decide
from gpu_service.scheduling.plan import IterationPlan, Mode, SubBatch, SweepResult
from gpu_service.scheduling.predictor import Phases, Predictor
from gpu_service.scheduling.request import Choice
from gpu_service.scheduling.state import SchedulerState
from gpu_service.scheduling.work import WAYS, SweepWork, work_of

REVISED_EVERY = 8
"""Iterations that a decision holds: averages of many choices do not change faster."""
_NEWEST = 0.05


@dataclass
class Accounts:
    """What was predicted and what came of it, since the start."""

    iterations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    """By way."""
    streamed_iterations: int = 0
    """Those with streamed rows, whatever their way."""
    predicted: Phases = field(default_factory=lambda: Phases(0.0, 0.0, 0.0, 0.0))
    """Milliseconds, sums."""
    actual_ms: float = 0.0
    """Of the same sweeps."""
    error: float = 0.0
    """Moving average of |predicted - actual| / the larger over all sweeps."""
    gpu_busy_seconds: float = 0.0
    cpu_busy_seconds: float = 0.0
    """As the host tells it, about once a second."""
    seconds: float = 0.0
    """Of iterations."""

    def add(self, work: SweepWork, predicted: Phases, actual_ms: float) -> None:
        known = self.predicted
        self.predicted = Phases(
            known.gpu + predicted.gpu,
            known.cpu + predicted.cpu,
            known.link + predicted.link,
            known.total + predicted.total,
        )
        self.actual_ms += actual_ms
        off = abs(predicted.total - actual_ms) / max(predicted.total, actual_ms)
        self.error += _NEWEST * (off - self.error)


@dataclass(frozen=True)
class _Foretold:
    """Of a sweep whose result has not come."""

    work: SweepWork
    predicted: Phases
    waits: bool
    """It begins behind copies beside the plan before it."""


class Steering:
    """Used by the scheduler alone. Without a predictor nothing is decided or foretold, and only
    iterations are counted."""

    def __init__(self, state: SchedulerState, predictor: Predictor | None) -> None:
        assert predictor is not None or not state.limits.auto, "auto decides by predictions"
        self.predictor = predictor
        self.accounts = Accounts()
        self._state = state
        self._revised = -REVISED_EVERY
        self._queued = False
        self._ended_early = 1.0
        """Part of their `max_tokens` that choices decode, a moving average."""
        self._host_work = HostWork()
        self._foretold: dict[int, _Foretold] = {}
        """By the plan's number."""
        self._copies = False
        """Copies run beside the last plan, maybe longer than its sweep."""
        if state.limits.auto:
            state.decision = Decision()

    @property
    def decision(self) -> Decision | None:
        """None where a setting says how host rows run."""
        return self._state.decision

    def revise(self, iteration: int) -> None:
        """Before each iteration: decide anew if it is time."""
        state = self._state
        if not state.limits.auto or self.predictor is None:
            return
        queued = len(state.waiting) > 0
        if iteration - self._revised < REVISED_EVERY and queued == self._queued:
            return
        self._revised, self._queued = iteration, queued
        assert state.decision is not None
        if not state.host_up:
            state.decision = Decision(why="there is no host tier now")
            return
        demand = demand_of(state, self._ended_early)
        must = any(state.never_on_gpu(choice) for choice in state.running)
        must = must or any(state.never_on_gpu(choice) for choice in state.ahead())
        state.decision = decide(demand, self.predictor, state.limits, state.decision, must)

    def lay_out(self, batches: tuple[SubBatch, ...]) -> tuple[Mode, tuple[SubBatch, ...]]:
        """The mode of an iteration with these rows, and its sub-batches."""
        state, decision = self._state, self._state.decision
        rows = any(batch.host_decode for batch in batches)
        if state.flights or (state.defers and rows):
            return Mode.DEFERRED, batches
        if state.splits:
            costs = None if decision is None else self.predictor
            batches = tuple(part for whole in batches for part in balance.split(whole, costs))
        return Mode.ASYMMETRIC if len(batches) == 2 else Mode.INLINE, batches

    def launched(self, plan: IterationPlan) -> None:
        """Its sweep has begun, and its host rows are under way."""
        state = self._state
        waits, self._copies = self._copies, bool(plan.migrations) and plan.copies_beside
        cohorts = max(1, state.limits.cohorts)
        work = work_of(plan, sum(state.flight_tokens.values()), cohorts)
        if work is None:
            return
        self.accounts.iterations[work.way] += 1
        self.accounts.streamed_iterations += work.streamed
        if self.predictor is not None:
            self._foretold[plan.number] = _Foretold(work, self.predictor.phases(work), waits)

    def observe(self, plan: IterationPlan, result: SweepResult, seconds: float) -> None:
        """The plan's result is there; from the result before it, `seconds` have passed."""
        foretold = self._foretold.pop(plan.number, None)
        measured = result.device_seconds or seconds
        self.accounts.seconds += seconds
        self.accounts.gpu_busy_seconds += min(measured, seconds) if foretold else 0.0
        if foretold is None or result.void or result.lost or measured <= 0:
            return
        if foretold.waits and not result.device_seconds:
            return  # how much of it is the wait for copies, nobody has measured
        work, predicted = foretold.work, foretold.predicted
        assert self.predictor is not None
        if not math.isfinite(predicted.total):
            return  # a setting says how host rows run, and nobody has measured the host
        self.accounts.add(work, predicted, 1e3 * measured)
        self.predictor.observe(work, predicted, 1e3 * measured)
        if result.device_seconds and not foretold.waits:
            self.predictor.observe_iteration(not work.is_plain, seconds, result.device_seconds)

    def observe_host(self, work: HostWork) -> None:
        """What the host has told last, maybe nothing new."""
        before, self._host_work = self._host_work, work
        if work == before:
            return
        if work.busy_seconds < before.busy_seconds:
            before = HostWork()  # another epoch
        busy = work.busy_seconds - before.busy_seconds
        self.accounts.cpu_busy_seconds += busy
        if self.predictor is not None:
            tokens, sweeps = work.kv_tokens - before.kv_tokens, work.sweeps - before.sweeps
            self.predictor.observe_host(tokens, 1e3 * busy, sweeps)

    def ended(self, choice: Choice) -> None:
        """A choice has ended by itself, with all its tokens."""
        part = len(choice.output) / max(1, choice.request.max_tokens)
        self._ended_early += _NEWEST * (part - self._ended_early)
