"""Mode INLINE: one sub-batch, and every layer waits for its own host rows.

    GPU | pre i | submit | chunks, GPU decode i | wait | post i | pre i+1 ...
    CPU                  |== host decode i ==|

The host's attention hides behind the GPU tier's attention of the same layer, and behind nothing
else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_service.offload.host_tier import HostRows, HostTierStalled
from gpu_service.pipeline.batch import Chunk, DeviceBatch
from gpu_service.pipeline.parts import EngineParts, LaneOutcome
from gpu_service.pipeline.prefill import prefill_attention
from gpu_service.scheduling.plan import Tier


def run_inline(parts: EngineParts, batches: Sequence[DeviceBatch]) -> list[LaneOutcome]:
    """At most one batch."""
    assert len(batches) <= 1
    return [_Sweep(parts, batch).run() for batch in batches]


class _Sweep:
    """One pass over the layers."""

    def __init__(self, parts: EngineParts, batch: DeviceBatch) -> None:
        self._model = parts.model
        self._geometry = parts.geometry
        self._gpu = parts.gpu
        self._host = parts.host
        self._batch = batch
        self._host_void = False
        self._void_chunks: set[int] = set()

    def run(self) -> LaneOutcome:
        batch, model = self._batch, self._model
        if batch.gpu_tables is not None:
            self._gpu.begin_sweep(batch.gpu_tables)
        if batch.host_tables is not None:
            self._begin_host()
        state = model.embed(batch.token_ids)
        out: torch.Tensor | None = None
        for layer in range(self._geometry.layers):
            q, k, v = model.pre_projection(layer, state, batch.positions)
            if out is None:
                # Void rows are never written: zeros keep them finite.
                out = torch.zeros_like(q)
            self._attention(layer, q, k, v, out)
            state = model.post_projection(layer, state, out)
        void = self._void_chunks.union(batch.host_keys if self._host_void else ())
        return LaneOutcome(state, frozenset(void))

    def _attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        batch = self._batch
        self._submit_host(layer, q, k, v)
        for chunk in batch.chunks:
            self._chunk(layer, chunk, q, k, v, out)
        if batch.gpu_tables is not None:
            rows = batch.gpu_rows
            self._gpu.decode(layer, q[rows], k[rows], v[rows], out[rows])
        self._wait_host(layer, out)

    def _chunk(
        self,
        layer: int,
        chunk: Chunk,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        if chunk.key in self._void_chunks:
            return
        rows, window = chunk.rows, self._geometry.windows[layer]
        own_k, own_v = k[rows], v[rows]
        try:
            self._store(layer, chunk, own_k, own_v)
            context = chunk.masks.context(window)
            if context:
                earlier = chunk.earlier_slots[-context:]
                old_k, old_v = self._load(layer, chunk.tier, earlier, own_k.device)
                own_k, own_v = torch.cat((old_k, own_k)), torch.cat((old_v, own_v))
        except HostTierStalled:
            self._void_chunks.add(chunk.key)
            return
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

    # -- host decode rows: after a stall the sweep goes on without them ----------------------

    def _begin_host(self) -> None:
        tables = self._batch.host_tables
        assert tables is not None
        try:
            self._host.begin_sweep([HostRows(tables.lengths, tables.block_tables)])
        except HostTierStalled:
            self._host_void = True

    def _submit_host(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if self._batch.host_tables is None or self._host_void:
            return
        rows = self._batch.host_rows
        try:
            self._host.submit(0, layer, q[rows], k[rows], v[rows])
        except HostTierStalled:
            self._host_void = True

    def _wait_host(self, layer: int, out: torch.Tensor) -> None:
        if self._batch.host_tables is None or self._host_void:
            return
        try:
            self._host.wait(0, layer, out[self._batch.host_rows])
        except HostTierStalled:
            self._host_void = True
