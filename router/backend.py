"""What the router knows about one backend: its newest snapshot, its open calls, how calls went."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import grpc.aio

from protos.neo.v1 import engine_pb2 as engine
from router.views import BackendState, BackendView, LoadView

SETTLE_SECONDS = 0.05
"""A call may take this long to show up in the backend's snapshots."""
SUSPECT_BASE_SECONDS = 0.25
SUSPECT_MAX_SECONDS = 10.0


def load_view(load: engine.LoadSnapshot) -> LoadView:
    total = load.gpu.total_blocks + load.host.total_blocks
    free = load.gpu.free_blocks + load.host.free_blocks
    return LoadView(
        total_tokens=total * load.block_tokens,
        used_tokens=max(0, total - free) * load.block_tokens,
        running_requests=load.gpu.running_requests + load.host.running_requests,
        waiting_requests=load.waiting_requests,
        waiting_prompt_tokens=load.waiting_prompt_tokens,
        max_waiting_requests=load.max_waiting_requests,
    )


class Backend:
    """One gpu_service. Used by the router's event loop alone; owns the channel until `close`.

    `now` arguments are seconds of one monotonic clock. A snapshot older than `stale_seconds` makes
    the backend SUSPECT.
    """

    def __init__(self, address: str, channel: grpc.aio.Channel, stale_seconds: float) -> None:
        self.address = address
        self.channel = channel
        self.calls_total = 0
        self.failures_total = 0
        self.removed = False
        """No longer one of the router's backends; forgotten when its calls have ended."""
        self.models: tuple[str, ...] = ()
        """That it serves; none: it has not said."""
        self.load: engine.LoadSnapshot | None = None
        self.load_at = 0.0
        self._load_view: LoadView | None = None
        self._stale_seconds = stale_seconds
        self._open: dict[int, float] = {}  # call number -> when it was sent, oldest first
        self._failed_watches = 2  # DOWN until the first snapshot
        self._watch_problem = "not reached yet"
        self._failed_calls = 0
        self._suspect_until = 0.0
        self._on_idle: Callable[[], None] = lambda: None

    @property
    def in_flight(self) -> int:
        return len(self._open)

    # What the load stream says -----------------------------------------------------------------

    def snapshot(self, load: engine.LoadSnapshot, now: float) -> None:
        self.load = load
        self.load_at = now
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
    def call(self, now: float) -> Iterator[None]:
        """Counts one call as open."""
        number = self.calls_total
        self.calls_total += 1
        self._open[number] = now
        try:
            yield
        finally:
            del self._open[number]
            if not self._open:
                self._on_idle()

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call it whenever the last open call has ended."""
        self._on_idle = callback

    def call_failed(self, now: float) -> None:
        """The backend could not be reached, or went away under a call. Each further failure in a
        row doubles the time for which others are preferred."""
        self.failures_total += 1
        backoff = SUSPECT_BASE_SECONDS * 2.0 ** min(self._failed_calls, 10)
        self._failed_calls += 1
        self._suspect_until = now + min(backoff, SUSPECT_MAX_SECONDS)

    def call_answered(self) -> None:
        """The backend answered, be it with an error of its own."""
        self._failed_calls = 0
        self._suspect_until = 0.0

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
        if now < self._suspect_until:
            return BackendState.SUSPECT, "a call could not reach it"
        return BackendState.UP, ""

    def view(self, now: float) -> BackendView:
        return BackendView(
            address=self.address,
            state=self.assess(now)[0],
            load=self._load_view,
            in_flight=self.in_flight,
            unseen=self._unseen(),
            age_seconds=now - self.load_at if self.load is not None else 0.0,
        )

    def _unseen(self) -> int:
        count = 0
        for sent_at in reversed(self._open.values()):
            if sent_at < self.load_at - SETTLE_SECONDS:
                break
            count += 1
        return count

    async def close(self) -> None:
        await self.channel.close(None)
