"""Streamed rows on `--device cpu`: the host tier's blocks come into staging one layer ahead, and
the device attends over them.

    staging | layer i     | layer i + 1 | layer i + 2     two layers' worth, used in turn
    link    | reads i + 1 | reads i + 2 | ...
    device  | attends i   | attends i+1 | ...

The row's own K and V go into staging with attention, and into the host pool at their slot. A CUDA
device does the same with kernels (`gpu_service.pipeline.cuda.streamed`).
"""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from gpu_service.kv.table import slots_of
from gpu_service.offload.host_tier import HostTier
from gpu_service.pipeline.cpu_kv import layout_of
from gpu_service.pipeline.device_kv import AttentionGeometry, DecodeTables
from kernels.cpu import KvPool, ThreadPool, decode_attention


class Staging:
    """Room for `blocks` blocks of two layers, in the model's dtype. Owns its memory."""

    def __init__(
        self, geometry: AttentionGeometry, dtype: torch.dtype, blocks: int, threads: ThreadPool
    ) -> None:
        layout = replace(layout_of(geometry, dtype), layers=2)
        self.blocks = blocks
        self.pool = KvPool(layout, blocks, mmap.mmap(-1, layout.pool_bytes(blocks)))
        self.threads = threads


class StreamedRows:
    """Those of one sweep. Every call may raise `HostTierStalled`: none of them counts then."""

    def __init__(
        self, geometry: AttentionGeometry, staging: Staging, host: HostTier, tables: DecodeTables
    ) -> None:
        """`tables`: of the host pool."""
        self._geometry = geometry
        self._staging = staging
        self._host = host
        self._lengths = tables.lengths
        size = geometry.block_tokens
        ends = np.cumsum(-(-tables.lengths // size), dtype=np.int32)
        assert ends[-1] <= staging.blocks
        firsts = np.concatenate((np.zeros(1, np.int32), ends[:-1]))
        width: npt.NDArray[np.int32] = np.arange(tables.block_tables.shape[1], dtype=np.int32)
        self._tables: npt.NDArray[np.int32] = firsts[:, None] + width
        self._known = torch.from_numpy(_known_slots(tables.block_tables, tables.lengths, size))
        self._staged = torch.from_numpy(_known_slots(self._tables, tables.lengths, size))
        last = tables.lengths.astype(np.int64) - 1
        blocks = np.take_along_axis(tables.block_tables, last[:, None] // size, axis=1)[:, 0]
        self._own = torch.from_numpy(blocks.astype(np.int64) * size + last % size)
        """Slots of the rows' new tokens in the host pool."""
        self._fetch(0)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """As `DeviceKv.decode`."""
        if layer + 1 < self._geometry.layers:
            self._fetch(layer + 1)
        decode_attention(
            self._staging.threads,
            self._staging.pool,
            layer % 2,
            q,
            k,
            v,
            self._tables,
            self._lengths,
            out,
            scale=self._geometry.scale,
            window=self._geometry.windows[layer],
        )
        self._host.write_kv(layer, self._own, k, v)

    def _fetch(self, layer: int) -> None:
        if len(self._known):
            k, v = self._host.read_kv(layer, self._known)
            self._staging.pool.write(layer % 2, self._staged, k, v, threads=self._staging.threads)


def _known_slots(
    tables: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], block_tokens: int
) -> npt.NDArray[np.int64]:
    """Of all rows' tokens but the new ones."""
    return np.concatenate(
        [
            slots_of(table, 0, int(length) - 1, block_tokens)
            for table, length in zip(tables, lengths, strict=True)
        ]
    )
