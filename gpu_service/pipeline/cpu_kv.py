"""The GPU tier's KV on `--device cpu`: ordinary memory in the host pool's layout, and the same C++
kernels."""

from __future__ import annotations

import mmap

import torch

from gpu_service.pipeline.device_kv import AttentionGeometry, DecodeTables
from kernels.cpu import DType, KvLayout, KvPool, ThreadPool, decode_attention

DTYPES = {
    torch.float32: DType.FLOAT32,
    torch.bfloat16: DType.BFLOAT16,
    torch.float16: DType.FLOAT16,
}


def layout_of(geometry: AttentionGeometry, dtype: torch.dtype) -> KvLayout:
    return KvLayout(
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        block_tokens=geometry.block_tokens,
        dtype=DTYPES[dtype],
    )


class CpuDeviceKv:
    """A `DeviceKv` over `kernels.cpu`. Owns its memory, which the system commits as it is first
    written."""

    def __init__(
        self, geometry: AttentionGeometry, dtype: torch.dtype, blocks: int, threads: ThreadPool
    ) -> None:
        layout = layout_of(geometry, dtype)
        self._geometry = geometry
        self._dtype = dtype
        self._threads = threads
        self._memory = mmap.mmap(-1, layout.pool_bytes(blocks))
        self.pool = KvPool(layout, blocks, self._memory)
        """For migration to copy whole blocks."""
        self.blocks = blocks
        self._tables: DecodeTables | None = None

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.pool.write(layer, slots, k, v, threads=self._threads)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (slots.shape[0], self._geometry.kv_heads, self._geometry.head_dim)
        k, v = torch.empty(shape, dtype=self._dtype), torch.empty(shape, dtype=self._dtype)
        self.pool.read(layer, slots, k, v, threads=self._threads)
        return k, v

    def begin_sweep(self, tables: DecodeTables) -> None:
        self._tables = tables

    def decode(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        assert self._tables is not None, "begin_sweep comes first"
        decode_attention(
            self._threads,
            self.pool,
            layer,
            q,
            k,
            v,
            self._tables.block_tables,
            self._tables.lengths,
            out,
            scale=self._geometry.scale,
            window=self._geometry.windows[layer],
        )
