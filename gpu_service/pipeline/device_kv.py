"""The GPU tier's KV pool and its decode attention, whatever the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class AttentionGeometry:
    """What attention needs to know of a model and never changes."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    scale: float
    """Multiplies q.k before the softmax."""
    windows: tuple[int, ...]
    """Per layer: tokens that a query sees, itself included; 0 means all."""


@dataclass(frozen=True)
class DecodeTables:
    """Decode rows of one sweep, on the host.

    lengths: `[rows]` int32, tokens attended, the new one included; at least 1.
    block_tables: `[rows, width]` int32; entries past ceil(length / block_tokens) are ignored.
    """

    lengths: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]


def staging_cost(streamed_blocks: int, layers: int) -> int:
    """Blocks of the GPU pool that staging takes: so many blocks of two layers, and again as they
    come from the host, which on a CPU or in int8 takes less."""
    return -(-4 * streamed_blocks // layers)


def without_staging(blocks: int, streamed_blocks: int, layers: int) -> int:
    """What is left of a GPU pool once staging has its share."""
    cost = staging_cost(streamed_blocks, layers)
    if cost >= blocks:
        raise ValueError(
            f"streamed_kv_blocks: staging for {streamed_blocks} host blocks takes {cost} blocks of "
            f"the GPU pool, which has {blocks}"
        )
    return blocks - cost


class DeviceKv(Protocol):
    """Block-paged K and V of every layer on the engine's device. Used by the engine core's thread.

    Tensors are on the device, contiguous and in the model's dtype. A slot is
    `block * block_tokens + offset`. Ids have been checked by the allocator that made them.
    """

    @property
    def blocks(self) -> int: ...

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store `k`, `v` `[tokens, kv_heads, head_dim]` at `slots` `[tokens]` int64."""
        ...

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[tokens, kv_heads, head_dim]` at `slots` `[tokens]` int64."""
        ...

    def begin_sweep(self, tables: DecodeTables) -> None:
        """Take the tables that `decode` uses from now on; once per sweep, so that they travel to
        the device once and not with each layer."""
        ...

    def decode(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Append `k`, `v` `[rows, kv_heads, head_dim]` at each row's last position and attend with
        `q` `[rows, query_heads, head_dim]` into `out`, which has the same shape."""
        ...
