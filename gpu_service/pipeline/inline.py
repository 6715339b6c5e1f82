"""Mode INLINE: one sub-batch, and every layer waits for its own host rows.

    GPU | pre i | submit | chunks, GPU decode i | wait | post i | pre i+1 ...
    CPU                  |== host decode i ==|

The host's attention hides behind the GPU tier's attention of the same layer, and behind nothing
else.
"""

from __future__ import annotations

import torch

from gpu_service.offload.host_tier import HostRows, HostTierStalled
from gpu_service.pipeline.batch import DeviceBatch
from gpu_service.pipeline.device_rows import DeviceRows
from gpu_service.pipeline.parts import EngineParts, LaneOutcome


def run_inline(parts: EngineParts, batch: DeviceBatch) -> LaneOutcome:
    """One pass over the layers."""
    return _Sweep(parts, batch).run()


class _Sweep:
    def __init__(self, parts: EngineParts, batch: DeviceBatch) -> None:
        self._model = parts.model
        self._layers = parts.geometry.layers
        self._host = parts.host
        self._batch = batch
        self._rows = DeviceRows(parts, batch)
        self._host_void = False

    def run(self) -> LaneOutcome:
        batch, model = self._batch, self._model
        if batch.host_tables is not None:
            self._begin_host()
        state = model.embed(batch.token_ids)
        out: torch.Tensor | None = None
        for layer in range(self._layers):
            q, k, v = model.pre_projection(layer, state, batch.positions)
            if out is None:
                # Void rows are never written: zeros keep them finite.
                out = torch.zeros_like(q)
            self._submit_host(layer, q, k, v)
            self._rows.attend(layer, q, k, v, out)
            self._wait_host(layer, out)
            state = model.post_projection(layer, state, out)
        void = self._rows.void.union(batch.host_keys if self._host_void else ())
        return LaneOutcome(state, frozenset(void))

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
