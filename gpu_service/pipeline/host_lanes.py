"""Host decode rows of one sweep that are waited for in the layer where they leave. After a stall
the sweep goes on without them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_service.offload.host_tier import HostRows, HostTierStalled
from gpu_service.pipeline.batch import DeviceBatch
from gpu_service.pipeline.cohorts import no_tables
from gpu_service.pipeline.parts import EngineParts


class HostLanes:
    """Lane i serves sub-batch i. No call raises `HostTierStalled`: a sweep has one end for all its
    lanes, so that a stall of one is a stall of all."""

    def __init__(self, parts: EngineParts, batches: Sequence[DeviceBatch]) -> None:
        """Tells the host who will come, if anybody does."""
        self._host = parts.host
        self._clock = parts.host_wait
        self._batches = batches
        self.stalled = False
        if all(batch.host_tables is None for batch in batches):
            return
        tables = [batch.host_tables or no_tables() for batch in batches]
        try:
            self._host.begin_sweep([HostRows(t.lengths, t.block_tables) for t in tables])
        except HostTierStalled:
            self.stalled = True

    def submit(
        self, lane: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """The host starts with that layer of the lane. `q`, `k`, `v`: of all the sub-batch's
        rows."""
        batch = self._batches[lane]
        if batch.host_tables is None or self.stalled:
            return
        rows = batch.host_rows
        try:
            self._host.submit(lane, layer, q[rows], k[rows], v[rows])
        except HostTierStalled:
            self.stalled = True

    def wait(self, lane: int, layer: int, out: torch.Tensor) -> None:
        """Fill the host rows of `out`, which has all the sub-batch's rows."""
        batch = self._batches[lane]
        if batch.host_tables is None or self.stalled:
            return
        try:
            with self._clock:
                self._host.wait(lane, layer, out[batch.host_rows])
        except HostTierStalled:
            self.stalled = True

    def void(self, lane: int) -> frozenset[int]:
        """Choices whose host decode rows do not count."""
        return frozenset(self._batches[lane].host_keys if self.stalled else ())
