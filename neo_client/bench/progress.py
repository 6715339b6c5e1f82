"""A line about a run while it goes: rewritten on a terminal, now and then a new one elsewhere."""

from __future__ import annotations

import asyncio
import sys
from typing import TextIO

import numpy as np

from neo_client.bench.drive import TICK_SECONDS, Driver
from neo_client.bench.own import BUSY_SHARE, OwnLoad

TERMINAL_SECONDS = 0.5
FILE_SECONDS = 5.0
WINDOW_SECONDS = 5.0
"""Rates and percentiles of the line are those of the last so many seconds."""
_TAIL = 2000
"""Newest samples that are looked at for it."""


def line(driver: Driver, own: OwnLoad, total: int | None) -> str:
    now = driver.now()
    since = max(now - WINDOW_SECONDS, 0.0)
    recent = [s for s in driver.samples[-_TAIL:] if s.end >= since]
    failed = sum(not sample.ok for sample in driver.samples)
    first, last = int(since / TICK_SECONDS), int(now / TICK_SECONDS)
    tokens = sum(driver.ticks[tick] for tick in range(first, last))
    rate = tokens / max((last - first) * TICK_SECONDS, TICK_SECONDS)
    ttft = [1e3 * s.ttft for s in recent if s.ttft is not None]
    shown = f"{np.percentile(ttft, 50):.0f}/{np.percentile(ttft, 99):.0f}" if ttft else "-"
    parts = [
        f"{now:6.1f} s",
        f"{len(driver.samples)}{'' if total is None else f' of {total}'} ended",
        f"{driver.live} under way",
        f"{rate:.0f} tok/s",
        f"TTFT p50/p99 {shown} ms",
    ]
    if failed:
        parts.append(f"{failed} failed")
    if own.loop_share > BUSY_SHARE:
        parts.append(f"CLIENT AT ITS LIMIT ({own.loop_share:.0%} of a core)")
    return " | ".join(parts)


async def show(driver: Driver, own: OwnLoad, total: int | None, out: TextIO = sys.stderr) -> None:
    """Until cancelled; the last state stays."""
    terminal = out.isatty()
    try:
        while True:
            await asyncio.sleep(TERMINAL_SECONDS if terminal else FILE_SECONDS)
            _print(line(driver, own, total), out, terminal)
    finally:
        if terminal:
            _print(line(driver, own, total), out, terminal)
            out.write("\n")


def _print(text: str, out: TextIO, terminal: bool) -> None:
    out.write(f"\r\x1b[2K{text}" if terminal else f"{text}\n")
    out.flush()
