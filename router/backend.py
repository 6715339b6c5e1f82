"""What the router knows about one backend: its newest snapshot, its open calls, how calls went."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import grpc.aio

from protos.neo.v1 import engine_pb2 as engine
from router.calls import OpenCall, OpenCalls
from router.health import CallHealth, Circuit, HealthLimits
from router.views import BackendState, BackendView, LoadView, TierView

LEAST_RATE = 1e-9
"""What is smaller, or larger than its inverse, is no rate."""


def load_view(load: engine.LoadSnapshot) -> LoadView:
    return LoadView(
        gpu=_tier_view(load.gpu, load.block_tokens),
        host=_tier_view(load.host, load.block_tokens),
        waiting_requests=load.waiting_requests,
        waiting_prompt_tokens=load.waiting_prompt_tokens,
        max_waiting_requests=load.max_waiting_requests,
        prompt_tokens_per_second=_known(load.prompt_tokens_per_second),
    )


def _tier_view(load: engine.TierLoad, block_tokens: int) -> TierView:
    return TierView(
        total_tokens=load.total_blocks * block_tokens,
        used_tokens=max(0, load.total_blocks - load.free_blocks) * block_tokens,
        running_requests=load.running_requests,
        freed_tokens_per_second=_known(load.freed_tokens_per_second),
        token_seconds=_known(load.token_seconds),
    )


def _known(rate: float) -> float:
    """What can be no rate counts as unknown: one backend's NaN must not fail others' calls."""
    return rate if LEAST_RATE < rate < 1 / LEAST_RATE else 0.0


class Backend:
    """One gpu_service. Used by the router's event loop alone; owns the channel until `close`.

    `now` arguments are seconds of one monotonic clock. A snapshot older than `stale_seconds` makes
    the backend SUSPECT.
    """

    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        stale_seconds: float,
        limits: HealthLimits = HealthLimits(),  # noqa: B008 -- frozen
    ) -> None:
        self.address = address
        self.channel = channel
        self._limits = limits
        self.health = CallHealth(limits)
        self.calls = OpenCalls()
        self.failures_total = 0
        self.removed = False
        """No longer one of the router's backends; forgotten when its calls have ended."""
        self.models: tuple[str, ...] = ()
        """That it serves; none: it has not said."""
        self.load: engine.LoadSnapshot | None = None
        self.load_at = 0.0
        self._load_view: LoadView | None = None
        self._stale_seconds = stale_seconds
        self._failed_watches = 2  # DOWN until the first snapshot
        self._watch_problem = "not reached yet"
        self._declined_at = float("-inf")
        self._on_idle: Callable[[], None] = lambda: None

    @property
    def calls_total(self) -> int:
        """Sent to it, those that ended included."""
        return self.calls.total

    @property
    def in_flight(self) -> int:
        return len(self.calls)

    # What the load stream says -----------------------------------------------------------------

    def snapshot(self, load: engine.LoadSnapshot, now: float) -> None:
        if self.load is not None and load.instance_id != self.load.instance_id:
            # Another process: what the calls of the one before met says nothing of it.
            self.health = CallHealth(self._limits)
        self.load = load
        self.load_at = now
        self.calls.reported(now)
        self._load_view = load_view(load)
        self.models = tuple(load.models) or self.models
        self._failed_watches = 0
        self._watch_problem = ""

    def watch_failed(self, problem: str) -> None:
        """The load stream broke (SUSPECT), or could not be opened again after that (DOWN)."""
        self._failed_watches += 1
        self._watch_problem = problem

    # How calls go ------------------------------------------------------------------------------

    @contextmanager
    def call(self, now: float, prompt_tokens: int = 0) -> Iterator[OpenCall]:
        """Counts one call as open. prompt_tokens: see CallKeys."""
        health = self.health
        probes = health.sent(now)
        try:
            with self.calls.call(now, prompt_tokens) as call:
                yield call
        finally:
            if probes:
                health.withdrawn()
            if not self.calls:
                self._on_idle()

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call it whenever the last open call has ended."""
        self._on_idle = callback

    def call_failed(self, now: float) -> None:
        """The backend could not be reached, or went away under a call."""
        self.failures_total += 1
        self.health.unreachable(now)

    def call_went_wrong(self, now: float) -> None:
        """It answered with an error that is its own fault."""
        self.failures_total += 1
        self.health.failed(now)

    def call_declined(self, now: float) -> None:
        """It takes no calls now, which its newest snapshot does not know yet."""
        self._declined_at = now

    def call_answered(self, now: float) -> None:
        """The backend answered, be it with an error that is the caller's."""
        self.health.answered(now)

    # What follows ------------------------------------------------------------------------------

    def assess(self, now: float) -> tuple[BackendState, str]:
        """Its state, and why it is not UP."""
        if self.load is None or self._failed_watches >= 2:
            return BackendState.DOWN, self._watch_problem
        if self.removed:
            return BackendState.DRAINING, "no longer listed"
        if self.load.state == engine.ENGINE_STATE_DRAINING:
            return BackendState.DRAINING, "draining"
        if self.load.state != engine.ENGINE_STATE_SERVING:
            return BackendState.DOWN, "still starting"
        if self._failed_watches:
            return BackendState.SUSPECT, self._watch_problem
        if now - self.load_at > self._stale_seconds:
            return BackendState.SUSPECT, f"no load report for {now - self.load_at:.1f} s"
        return self._assess_calls(now)

    def _assess_calls(self, now: float) -> tuple[BackendState, str]:
        circuit = self.health.circuit(now)
        if circuit in (Circuit.OPEN, Circuit.PROBING):
            return BackendState.DOWN, f"calls could not reach it: the circuit is {circuit.value}"
        if self._declined_at >= self.load_at:
            return BackendState.SUSPECT, "it takes no calls"
        if circuit is Circuit.CLOSED and self.health.is_suspect(now):
            return BackendState.SUSPECT, "a call could not reach it"
        if self.health.is_ejected(now):
            return BackendState.SUSPECT, "too many of its calls failed"
        return BackendState.UP, ""

    def view(self, now: float) -> BackendView:
        return BackendView(
            address=self.address,
            state=self.assess(now)[0],
            load=self._load_view,
            own=self.calls.view(now),
            age_seconds=now - self.load_at if self.load is not None else 0.0,
        )

    async def close(self) -> None:
        await self.channel.close(None)
