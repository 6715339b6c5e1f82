"""Mode ASYMMETRIC: two unequal sub-batches, each in the dense layers while the host attends for the
other (NEO, arXiv 2411.01142, section 3).

    GPU | post 1, pre 1 | post 0, pre 0 | chunks, GPU decode 0 | post 1, pre 1 | ...
    CPU |== lane 0, layer i ==|== lane 1, layer i + 1 ========|== lane 0, layer i + 1 ==| ...

The host's rows of sub-batch 1 hide behind sub-batch 0's dense layers and attention, those of
sub-batch 0 behind sub-batch 1's dense layers. The price is a second pass over the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_service.pipeline.batch import DeviceBatch
from gpu_service.pipeline.device_rows import DeviceRows
from gpu_service.pipeline.host_lanes import HostLanes
from gpu_service.pipeline.parts import EngineParts, LaneOutcome


def run_asymmetric(parts: EngineParts, batches: Sequence[DeviceBatch]) -> list[LaneOutcome]:
    """One pass over the layers with both sub-batches; the second has host rows alone."""
    assert len(batches) == 2
    assert batches[1].host_rows.start == 0, "only one sub-batch attends on the device"
    host = HostLanes(parts, batches)
    first, second = (_Lane(parts, batch, lane, host) for lane, batch in enumerate(batches))
    second.leave(0)
    first.leave(0)
    for layer in range(parts.geometry.layers):
        for lane in (second, first):
            lane.come_back(layer)
            if layer + 1 < parts.geometry.layers:
                lane.leave(layer + 1)
    return [first.outcome(), second.outcome()]


class _Lane:
    """One sub-batch. Between `leave` and `come_back` the other one has the device."""

    def __init__(self, parts: EngineParts, batch: DeviceBatch, lane: int, host: HostLanes) -> None:
        self._model = parts.model
        self._batch = batch
        self._lane = lane
        self._host = host
        self._rows = DeviceRows(parts, batch)
        self._state = parts.model.embed(batch.token_ids)
        self._out: torch.Tensor | None = None

    def leave(self, layer: int) -> None:
        """Into attention: the host's rows are on their way, those of the device are done."""
        if self._is_void:
            return
        q, k, v = self._model.pre_projection(layer, self._state, self._batch.positions)
        if self._out is None:
            # Void rows are never written: zeros keep them finite.
            self._out = torch.zeros_like(q)
        self._host.submit(self._lane, layer, q, k, v)
        self._rows.attend(layer, q, k, v, self._out)

    def come_back(self, layer: int) -> None:
        """Out of attention: wait for the host's rows, and end the layer."""
        if self._out is None:
            return
        self._host.wait(self._lane, layer, self._out)
        if not self._is_void:
            self._state = self._model.post_projection(layer, self._state, self._out)

    @property
    def _is_void(self) -> bool:
        """No row of it counts any more."""
        return self._host.stalled and self._batch.host_rows.start == 0

    def outcome(self) -> LaneOutcome:
        return LaneOutcome(self._state, self._host.void(self._lane) | self._rows.void)
