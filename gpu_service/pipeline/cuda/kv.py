"""The GPU tier's KV pool for Triton kernels."""

from __future__ import annotations

import torch

from gpu_service.pipeline.device_kv import AttentionGeometry, DecodeTables
from kernels.gpu.decode_attention import DecodeAttention, choose_splits
from kernels.gpu.kv_cache import GpuKvLayout


def multiprocessors(device: torch.device) -> int:
    """1 in the interpreter, where each program costs the same."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def layout_of(geometry: AttentionGeometry, blocks: int, staging: int = 0) -> GpuKvLayout:
    return GpuKvLayout(
        layers=geometry.layers,
        blocks=blocks,
        kv_heads=geometry.kv_heads,
        block_tokens=geometry.block_tokens,
        head_dim=geometry.head_dim,
        staging=staging,
    )


class TritonDeviceKv:
    """A `DeviceKv` in the layout of `kernels.gpu.kv_cache`."""

    def __init__(
        self,
        geometry: AttentionGeometry,
        dtype: torch.dtype,
        blocks: int,
        device: torch.device,
        max_rows: int,
        staging: int = 0,
    ) -> None:
        """staging: as `GpuKvLayout.staging`."""
        self.layout = layout_of(geometry, blocks, staging)
        self.memory = self.layout.allocate(dtype, device)
        """`layout.shape`"""
        self.blocks = blocks
        self._geometry = geometry
        splits = choose_splits(max(1, max_rows // 4), geometry.kv_heads, multiprocessors(device))
        self._attention = DecodeAttention(
            self.layout, geometry.query_heads, max_rows, splits, device
        )
        self._lengths = self._tables = self._slots = torch.empty(0)

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        blocks, offsets = self._place(slots)
        self.memory[layer][:, 0][blocks, :, offsets] = k
        self.memory[layer][:, 1][blocks, :, offsets] = v

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, offsets = self._place(slots)
        k, v = (self.memory[layer][:, part][blocks, :, offsets] for part in (0, 1))
        return k.contiguous(), v.contiguous()

    def begin_sweep(self, tables: DecodeTables) -> None:
        device, size = self.memory.device, self.layout.block_tokens
        self._lengths = torch.from_numpy(tables.lengths).to(device)
        self._tables = torch.from_numpy(tables.block_tables).to(device)
        last = (self._lengths - 1).long()
        blocks = self._tables.gather(1, (last // size)[:, None])[:, 0].long()
        self._slots = blocks * size + last % size

    def decode(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        self.write(layer, self._slots, k, v)
        self._attention(
            q,
            self.memory[layer],
            self._tables,
            self._lengths,
            out,
            scale=self._geometry.scale,
            window=self._geometry.windows[layer],
        )

    def _place(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return slots // self.layout.block_tokens, slots % self.layout.block_tokens
