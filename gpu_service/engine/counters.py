"""What the engine has done since it started, for metrics: counted once per iteration, and sent to
the front end a few times a second."""

from __future__ import annotations

from bisect import bisect_left

from gpu_service.engine.messages import ITERATION_TOKEN_BOUNDS, EngineCounters, Foresight
from gpu_service.scheduling.decision import Decision
from gpu_service.scheduling.plan import IterationPlan, Migration, Mode, SweepResult, Tier
from gpu_service.scheduling.steering import Steering

SEND_SECONDS = 0.1
"""Between two reports, at least: Prometheus asks every few seconds, a person looks once a
second."""
GPU_ONLY = "gpu_only"
DIRECTIONS = {Tier.HOST: "demote", Tier.GPU: "promote"}
REUSE = "reuse"


def mode_name(plan: IterationPlan) -> str:
    """The plan's mode, or `gpu_only` where the host tier has no part in it."""
    if plan.mode is not Mode.INLINE:
        return str(plan.mode.value)
    for batch in plan.batches:
        if batch.host_decode or batch.streamed or any(r.tier is Tier.HOST for r in batch.prefill):
            return str(plan.mode.value)
    return GPU_ONLY


def direction_of(migration: Migration) -> str:
    """How metrics and traces call it."""
    return REUSE if migration.reuse else DIRECTIONS[migration.target]


def foresight(steering: Steering) -> Foresight | None:
    if steering.predictor is None:
        return None
    accounts, decision = steering.accounts, steering.decision
    predicted, decided = accounts.predicted, decision or Decision(why="")
    return Foresight(
        predicted_seconds={
            "sweep": 1e-3 * predicted.total,
            "gpu": 1e-3 * predicted.gpu,
            "cpu": 1e-3 * predicted.cpu,
            "link": 1e-3 * predicted.link,
        },
        actual_seconds=1e-3 * accounts.actual_ms,
        error=accounts.error,
        mode="" if decision is None else decision.way,
        tokens_per_second=1e3 * decided.rate,
        gpu_only_tokens_per_second=1e3 * decided.gpu_only_rate,
        why=decided.why,
        host_rows=decided.host_rows,
        streamed_rows=decided.streamed_rows,
        resident_tokens=round(decided.resident_tokens),
        host_busy_seconds=accounts.cpu_busy_seconds,
    )


class WorkCounters:
    """Used by the engine core's thread."""

    def __init__(self) -> None:
        modes = [GPU_ONLY, *(mode.value for mode in Mode)]
        tiers = [tier.value for tier in Tier]
        self._iterations = dict.fromkeys(modes, 0)
        self._seconds = dict.fromkeys(modes, 0.0)
        self._prefill = dict.fromkeys(tiers, 0)
        self._decode = dict.fromkeys(("gpu", "host", "streamed"), 0)
        self._moved_tokens = dict.fromkeys((*DIRECTIONS.values(), REUSE), 0)
        self._moved_blocks = dict.fromkeys(self._moved_tokens, 0)
        self._void = 0
        self._host_wait = 0.0
        self._device_wait = 0.0
        self._device_busy = 0.0
        self._sizes = [0] * (len(ITERATION_TOKEN_BOUNDS) + 1)
        self._size_sum = 0
        self._sent: EngineCounters | None = None
        self._sent_at = 0.0

    def count(self, plan: IterationPlan, result: SweepResult, seconds: float) -> None:
        """One iteration took `seconds`."""
        mode = mode_name(plan)
        self._iterations[mode] += 1
        self._seconds[mode] += seconds
        size = len(result.landed)
        for batch in plan.batches:
            for chunk in batch.prefill:
                self._prefill[chunk.tier.value] += len(chunk.token_ids)
            self._decode["gpu"] += len(batch.gpu_decode)
            self._decode["streamed"] += len(batch.streamed)
            self._decode["host"] += len(batch.host_decode)
            size += batch.tokens
            if plan.mode is Mode.DEFERRED:
                size -= len(batch.host_decode)  # in the dense layers when they land, too
        for migration in plan.migrations:
            if migration.key not in result.lost:
                direction = direction_of(migration)
                self._moved_tokens[direction] += migration.tokens
                self._moved_blocks[direction] += len(migration.source_blocks)
        self._sizes[bisect_left(ITERATION_TOKEN_BOUNDS, size)] += 1
        self._size_sum += size
        self._void += len(result.void)
        self._host_wait += result.host_wait_seconds
        self._device_wait += result.waited_seconds
        # A device that does not time its sweeps is busy for as long as nobody waits for the host.
        self._device_busy += result.device_seconds or seconds - result.host_wait_seconds

    def report(
        self, now: float, recomputed_tokens: int, steering: Steering, *, idle: bool
    ) -> EngineCounters | None:
        """What there is to tell: None if that is nothing new, or too soon. `idle`: no iteration
        will come to tell it later."""
        if not idle and now - self._sent_at < SEND_SECONDS:
            return None
        counters = EngineCounters(
            iterations=dict(self._iterations),
            seconds=dict(self._seconds),
            prefill_tokens=dict(self._prefill),
            decode_rows=dict(self._decode),
            moved_tokens=dict(self._moved_tokens),
            moved_blocks=dict(self._moved_blocks),
            recomputed_tokens=recomputed_tokens,
            void_rows=self._void,
            host_wait_seconds=self._host_wait,
            device_wait_seconds=self._device_wait,
            device_busy_seconds=self._device_busy,
            iteration_sizes=list(self._sizes),
            iteration_tokens=self._size_sum,
            foresight=foresight(steering),
        )
        if counters == self._sent:
            return None
        self._sent, self._sent_at = counters, now
        return counters
