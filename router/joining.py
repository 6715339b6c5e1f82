"""Messages of one stream leave together when the router is busy.

Passing on a message costs a read and a write of gRPC's, each with its wake-ups; what is in the
message hardly matters. While there is time each message leaves at once. When the router's thread
has none to spare, messages of one stream that come within `hold` of its last write leave as one:

    from the engine   a     b  c     d  e     f
    to the client     a     [  hold  ]bcd     [  hold  ]ef          one write instead of three

Bytes in a row are the message that holds all of them where fields are repeated (they append) or
the same each time (the last one wins): that is so for GenerateStreamResponse, and a test keeps it
so. The parts stay in order; that a client sees one choice twice in a message is said in the
protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from router.relay import Send

JOINABLE = frozenset({"/neo.v1.InferenceService/GenerateStream"})
"""Methods whose answers may be joined."""
MAX_BYTES = 16 << 10
"""Held back for one stream; more leaves at once, and while its write waits nothing more is read."""
INTERVAL_SECONDS = 0.1
BUSY = 0.85
"""Part of the time that the thread runs or waits for a CPU: above, messages are held longer."""
IDLE = 0.6
"""Below, shorter."""
FIRST_HOLD_SECONDS = 0.0025
STEP = 2.0


def busy_clock() -> Callable[[], float]:
    """Seconds for which the calling thread has been running, or ready to: from the scheduler where
    it says so (Linux); else the time that it ran."""
    path = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")

    def read() -> float:
        ran, waited = path.read_bytes().split()[:2]
        return (int(ran) + int(waited)) / 1e9

    return read if path.exists() else time.thread_time


class Pace:
    """How long messages may be held back now: `hold` seconds, 0 while the thread has time left.
    Used by one event loop, between `start` and `stop`."""

    def __init__(
        self,
        max_hold_seconds: float,
        *,
        busy: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """busy: see `busy_clock`, by default that of the thread that starts it."""
        self.hold = 0.0
        self._max = max_hold_seconds
        self._make_busy = busy_clock if busy is None else lambda: busy
        self._busy: Callable[[], float] = time.thread_time
        self._clock = clock
        self._seen = (0.0, 0.0)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._max <= 0:
            return
        self._busy = self._make_busy()
        self._seen = (self._busy(), self._clock())
        self._arm()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_SECONDS, self._look)

    def _look(self) -> None:
        self._arm()
        with contextlib.suppress(OSError):  # no descriptor is free; the next look spans both times
            self.look()

    def look(self) -> None:
        """See how busy the thread was since the last time."""
        busy, now = self._busy(), self._clock()
        part = (busy - self._seen[0]) / max(now - self._seen[1], 1e-6)
        self._seen = (busy, now)
        if part > BUSY:
            self.hold = min(self._max, max(self.hold * STEP, FIRST_HOLD_SECONDS))
        elif part < IDLE:
            shorter = self.hold / STEP
            self.hold = shorter if shorter >= FIRST_HOLD_SECONDS else 0.0


class Joined:
    """One stream's way to its client. All of it has been written when the block ends, but for a
    block that is cancelled: then what is held back is dropped."""

    def __init__(self, write: Send, pace: Pace) -> None:
        self._write = write
        self._pace = pace
        self._parts: list[bytes] = []
        self._size = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None

    async def put(self, message: bytes) -> None:
        """Pass `message` on, now or soon. Waits while the client takes nothing."""
        if not self._pace.hold and not self._parts and self._writing is None:
            await self._write(message)
            return
        self._parts.append(message)
        self._size += len(message)
        if self._size >= MAX_BYTES or asyncio.get_running_loop().time() >= self._due:
            await self._flush()
        else:
            self._arm()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(self._due, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_behind())
        # Else one is under way, and arms again; or it has failed, which the next `put` will say.

    async def _write_behind(self) -> None:
        await self._write_parts()
        self._writing = None
        if self._parts:
            self._arm()

    async def _flush(self) -> None:
        """Write all there is. Raises what a write in the background raised."""
        if self._writing is not None:
            await self._writing
        await self._write_parts()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _write_parts(self) -> None:
        if self._parts:
            joined = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            self._size = 0
            self._due = asyncio.get_running_loop().time() + self._pace.hold
            await self._write(joined)

    async def __aenter__(self) -> Joined:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if error is None or isinstance(error, Exception):
                await self._flush()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if self._writing is not None:
                self._writing.cancel()
                await asyncio.gather(self._writing, return_exceptions=True)
