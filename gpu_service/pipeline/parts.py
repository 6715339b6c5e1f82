"""What every mode's pipeline works with, and what it returns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType

import torch

from gpu_service.offload.host_tier import HostTier
from gpu_service.pipeline.device_kv import AttentionGeometry, DeviceKv
from gpu_service.pipeline.model import DenseModel
from gpu_service.pipeline.streamed import Staging
from gpu_service.scheduling.plan import Flight


class Stopwatch:
    """Adds up the time spent in its `with` blocks. One thread, not nested."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds since the last `take`."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@dataclass(frozen=True)
class EngineParts:
    """Made once; used by the engine core's thread."""

    model: DenseModel
    geometry: AttentionGeometry
    gpu: DeviceKv
    host: HostTier
    staging: Staging | None = None
    """None where sweeps have no streamed rows."""
    host_wait: Stopwatch = field(default_factory=Stopwatch)
    """Runs while a sweep waits for the host tier."""


@dataclass(frozen=True)
class LaneOutcome:
    """One sub-batch after the last layer.

    state: `[tokens, hidden]`; void rows hold anything, and have disturbed no other row.
    void: choices whose rows do not count and are to be repeated, since the host tier stalled.
    finished: deferred mode: rows that have come through all layers; the last ones of `state`.
    grounded: deferred mode: rows that were under way and will not come.
    """

    state: torch.Tensor
    void: frozenset[int]
    finished: tuple[Flight, ...] = ()
    grounded: tuple[Flight, ...] = ()
