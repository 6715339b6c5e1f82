"""What the two transports' epochs have in common."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from protos.neo.v1 import cpu_attention_pb2 as pb


@dataclass(frozen=True)
class ThreadPlan:
    """Threads of one session's attention."""

    threads: int
    cpus: tuple[int, ...]
    """Empty means not pinned."""
    spin_us: int


@dataclass(frozen=True)
class EpochStats:
    """Counters since the epoch's start."""

    sweeps: int = 0
    rows: int = 0
    kv_bytes_read: int = 0
    busy_seconds: float = 0.0

    def __add__(self, other: EpochStats) -> EpochStats:
        return EpochStats(
            self.sweeps + other.sweeps,
            self.rows + other.rows,
            self.kv_bytes_read + other.kv_bytes_read,
            self.busy_seconds + other.busy_seconds,
        )


class Epoch(Protocol):
    """One connection's worth of a session: it ends with the next resume, the pool does not."""

    number: int
    ended: asyncio.Event

    def describe(self, opened: pb.SessionOpened) -> None: ...

    def ready(self, nonce: bytes) -> None: ...

    def stats(self) -> EpochStats: ...

    async def stop(self) -> None: ...
