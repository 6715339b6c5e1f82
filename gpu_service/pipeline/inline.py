"""Mode INLINE: one sub-batch, and every layer waits for its own host rows.

    GPU | pre i | submit | chunks, GPU decode i | wait | post i | pre i+1 ...
    CPU                  |== host decode i ==|

The host's attention hides behind the GPU tier's attention of the same layer, and behind nothing
else.
"""

from __future__ import annotations

import torch

from gpu_service.pipeline.batch import DeviceBatch
from gpu_service.pipeline.device_rows import DeviceRows
from gpu_service.pipeline.host_lanes import HostLanes
from gpu_service.pipeline.parts import EngineParts, LaneOutcome


def run_inline(parts: EngineParts, batch: DeviceBatch) -> LaneOutcome:
    """One pass over the layers."""
    model, rows = parts.model, DeviceRows(parts, batch)
    host = HostLanes(parts, [batch])
    state = model.embed(batch.token_ids)
    out: torch.Tensor | None = None
    for layer in range(parts.geometry.layers):
        q, k, v = model.pre_projection(layer, state, batch.positions)
        if out is None:
            # Void rows are never written: zeros keep them finite.
            out = torch.zeros_like(q)
        host.submit(0, layer, q, k, v)
        rows.attend(layer, q, k, v, out)
        host.wait(0, layer, out)
        state = model.post_projection(layer, state, out)
    return LaneOutcome(state, host.void(0) | rows.void)
