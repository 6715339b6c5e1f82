"""Attention of the rows whose turn it is on the engine's own device: prompt chunks of either tier,
decode rows of the GPU tier, and streamed ones. Every mode has them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from gpu_service.offload.host_tier import HostTierStalled
from gpu_service.pipeline.batch import Chunk, DeviceBatch
from gpu_service.pipeline.parts import EngineParts
from gpu_service.pipeline.prefill import prefill_attention
from gpu_service.pipeline.streamed import StreamedRows
from gpu_service.scheduling.plan import Tier


class DeviceRows:
    """Those of one sub-batch, for one sweep."""

    def __init__(self, parts: EngineParts, batch: DeviceBatch) -> None:
        self._geometry = parts.geometry
        self._gpu = parts.gpu
        self._host = parts.host
        self._batch = batch
        self.void: set[int] = set()
        """Choices whose rows do not count, since the host tier stalled: they are left out."""
        self._streamed: StreamedRows | None = None
        if batch.gpu_tables is not None:
            self._gpu.begin_sweep(batch.gpu_tables)
        if batch.streamed_tables is not None:
            assert parts.staging is not None
            with self._voids(batch.streamed_keys):
                self._streamed = StreamedRows(
                    parts.geometry, parts.staging, parts.host, batch.streamed_tables
                )

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Store K and V and fill `out`'s rows; all begin with the sub-batch's rows."""
        batch = self._batch
        for chunk in batch.chunks:
            self._chunk(layer, chunk, q, k, v, out)
        if batch.gpu_tables is not None:
            rows = batch.gpu_rows
            self._gpu.decode(layer, q[rows], k[rows], v[rows], out[rows])
        if self._streamed is not None and self.void.isdisjoint(batch.streamed_keys):
            rows = batch.streamed_rows
            with self._voids(batch.streamed_keys):
                self._streamed.attend(layer, q[rows], k[rows], v[rows], out[rows])

    @contextmanager
    def _voids(self, keys: Collection[int]) -> Iterator[None]:
        """The host tier may stall within: their rows do not count then."""
        try:
            yield
        except HostTierStalled:
            self.void.update(keys)

    def _chunk(
        self,
        layer: int,
        chunk: Chunk,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        if chunk.key in self.void:
            return
        rows, window = chunk.rows, self._geometry.windows[layer]
        own_k, own_v = k[rows], v[rows]
        with self._voids((chunk.key,)):
            self._store(layer, chunk, own_k, own_v)
            context = chunk.masks.context(window)
            if context:
                earlier = chunk.earlier_slots[-context:]
                old_k, old_v = self._load(layer, chunk.tier, earlier, own_k.device)
                own_k, own_v = torch.cat((old_k, own_k)), torch.cat((old_v, own_v))
            mask = chunk.masks.mask(window)
            out[rows] = prefill_attention(self._geometry, q[rows], own_k, own_v, mask)

    def _store(self, layer: int, chunk: Chunk, k: torch.Tensor, v: torch.Tensor) -> None:
        """A layer's KV leaves for its tier as soon as it exists."""
        if chunk.tier is Tier.GPU:
            self._gpu.write(layer, chunk.slots, k, v)
        else:
            self._host.write_kv(layer, chunk.slots, k, v)

    def _load(
        self, layer: int, tier: Tier, slots: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if tier is Tier.GPU:
            return self._gpu.read(layer, slots)
        k, v = self._host.read_kv(layer, slots)
        return k.to(device), v.to(device)
