"""What the two transports' epochs have in common."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields, replace
from operator import add
from typing import Protocol

from kernels.cpu.dataplane import LAYER_BOUNDS_SECONDS
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
    """Counters since the epoch's start; `backlog` is of now."""

    sweeps: int = 0
    rows: int = 0
    """Rows times layers."""
    kv_bytes_read: int = 0
    busy_seconds: float = 0.0
    waits: int = 0
    """For the engine, in the middle of a sweep; shm alone knows of them."""
    wait_seconds: float = 0.0
    parks: int = 0
    """How often the worker went to sleep for want of work; shm alone."""
    backlog: int = 0
    """Layers submitted and not done; shm alone."""
    layer_seconds: float = 0.0
    """From when a layer was taken up until it was done; those taken up together overlap."""
    layers: tuple[int, ...] = (0,) * (len(LAYER_BOUNDS_SECONDS) + 1)
    """Attended, by their time: up to each bound, then the rest."""

    def __add__(self, other: EpochStats) -> EpochStats:
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name != "layers"
        }
        layers = tuple(map(add, self.layers, other.layers))
        return EpochStats(**sums, layers=layers)

    def ended(self) -> EpochStats:
        """As it counts once the epoch is over."""
        return replace(self, backlog=0)


class Epoch(Protocol):
    """One connection's worth of a session: it ends with the next resume, the pool does not."""

    number: int
    ended: asyncio.Event

    def describe(self, opened: pb.SessionOpened) -> None: ...

    def ready(self, nonce: bytes) -> None: ...

    def stats(self) -> EpochStats: ...

    async def stop(self) -> None: ...
