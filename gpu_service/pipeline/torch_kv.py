"""The GPU tier's KV on a CUDA device in plain torch: correct everywhere, and what faster kernels
are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from gpu_service.pipeline.device_kv import AttentionGeometry, DecodeTables


class TorchDeviceKv:
    """A `DeviceKv` that gathers each row's K and V, padded to the longest row.

    The gather costs one more pass over the KV read, and memory for it: the price of no kernel."""

    def __init__(
        self,
        geometry: AttentionGeometry,
        dtype: torch.dtype,
        blocks: int,
        device: torch.device,
    ) -> None:
        self._geometry = geometry
        self._device = device
        tokens = blocks * geometry.block_tokens
        shape = (geometry.layers, 2, tokens, geometry.kv_heads, geometry.head_dim)
        # Zeros and not whatever was there: padded rows read slots that nobody has written, and a
        # NaN there would survive a weight of zero.
        self._memory = torch.zeros(shape, dtype=dtype, device=device)
        self.blocks = blocks
        self._slots = torch.empty(0)
        self._last = torch.empty(0)
        self._positions = torch.empty(0)

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._memory[layer, 0].index_copy_(0, slots, k)
        self._memory[layer, 1].index_copy_(0, slots, v)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._memory[layer]
        return keys.index_select(0, slots), values.index_select(0, slots)

    def begin_sweep(self, tables: DecodeTables) -> None:
        size = self._geometry.block_tokens
        lengths = torch.from_numpy(tables.lengths).to(self._device).long()
        blocks = torch.from_numpy(tables.block_tables).to(self._device).long()
        offsets = torch.arange(size, device=self._device)
        self._slots = (blocks[:, :, None] * size + offsets).flatten(1)
        self._last = self._slots.gather(1, (lengths - 1)[:, None])[:, 0]
        places = torch.arange(self._slots.shape[1], device=self._device)
        # Distance of each place to the row's query; negative behind the row's end.
        self._positions = (lengths - 1)[:, None] - places

    def decode(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        self.write(layer, self._last, k, v)
        keys, values = self._memory[layer][:, self._slots].transpose(2, 3)
        seen = self._positions >= 0
        window = self._geometry.windows[layer]
        if window:
            seen &= self._positions < window
        group = self._geometry.query_heads // self._geometry.kv_heads
        result = functional.scaled_dot_product_attention(
            q[:, :, None],
            keys.repeat_interleave(group, 1),
            values.repeat_interleave(group, 1),
            attn_mask=seen[:, None, None],
            scale=self._geometry.scale,
        )
        out.copy_(result[:, :, 0])
