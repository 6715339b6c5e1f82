"""Whether the load generator itself kept up: its share of a core, and how late its event loop was.

One event loop does everything. Near a whole core its timestamps are late and its requests too, and
what it reports is its own slowness: it must say so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PROBE_SECONDS = 0.05
BUSY_SHARE = 0.85
"""Of a core; beyond it queues form before the loop."""
LATE_SECONDS = 0.02
"""A p99 lateness of the loop that no longer disappears in latencies of tens of milliseconds."""


@dataclass
class OwnLoad:
    """`watch` runs beside the load, in its loop's thread."""

    clock: Callable[[], float] = time.perf_counter
    lateness: list[float] = field(default_factory=list)
    """Seconds by which the loop came late to each probe."""
    _begun: float = 0.0
    _process: float = 0.0
    _thread: float = 0.0

    async def watch(self) -> None:
        self._begun = self.clock()
        self._process, self._thread = time.process_time(), time.thread_time()
        while True:
            due = self.clock() + PROBE_SECONDS
            await asyncio.sleep(PROBE_SECONDS)
            self.lateness.append(max(self.clock() - due, 0.0))

    @property
    def loop_share(self) -> float:
        """Of a core, by the event loop's thread, since the start."""
        return (time.thread_time() - self._thread) / max(self.clock() - self._begun, 1e-9)

    def figures(self, held_back: int, delays: list[float]) -> dict[str, Any]:
        """Plain values for JSON. `held_back`: sessions that waited for a slot. `delays`: seconds
        from when each request was due to when it was sent."""
        late = _p99(self.lateness)
        share = self.loop_share
        limits = []
        if share > BUSY_SHARE:
            limits.append(f"its event loop used {share:.0%} of a core")
        if late > LATE_SECONDS:
            limits.append(f"its event loop was {1e3 * late:.0f} ms late at the 99th percentile")
        if held_back:
            limits.append(f"{held_back} requests were held back by --max-in-flight")
        elapsed = max(self.clock() - self._begun, 1e-9)
        return {
            "loop_core_share": round(share, 4),
            "process_cores": round((time.process_time() - self._process) / elapsed, 4),
            "loop_late_p99_ms": round(1e3 * late, 3),
            "send_delay_p99_ms": round(1e3 * _p99(delays), 3),
            "held_back": held_back,
            "limits": limits,
        }


def _p99(values: list[float]) -> float:
    return float(np.percentile(values, 99, method="inverted_cdf")) if values else 0.0
