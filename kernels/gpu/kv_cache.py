"""The GPU tier's paged KV cache: a tensor, and what fixes its shape.

    [layers][blocks][K | V][kv_heads][block_tokens][head_dim]

As in the host pool a *piece* (one block of one layer, K and V of all heads) is contiguous: 64 KiB
for Llama-3-8B at 16 tokens, so that demotion moves few large runs. Within a piece a head's tokens
are contiguous, 4 KiB of K that one program of the decode kernel reads in a run.

Behind the last layer there may be staging, two layers' worth of blocks whose KV is the host's: for
layers with even numbers and with odd ones. Tables and slots name its blocks by ids of their own:

    block id  | 0 ... blocks - 1 | STAGED ... STAGED + staging - 1 |
              | the layer's      | in staging[layer % 2]           |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

STAGED = 1 << 30
"""Blocks with this id or a larger one are in staging."""


@dataclass(frozen=True)
class GpuKvLayout:
    """Shape of the cache; `block_tokens` is 16, 32 or 64, `head_dim` a multiple of 16 up to 256."""

    layers: int
    blocks: int
    kv_heads: int
    block_tokens: int
    head_dim: int
    staging: int = 0
    """Blocks in staging, for each of two layers."""

    def __post_init__(self) -> None:
        if self.block_tokens not in (16, 32, 64):
            raise ValueError(f"block_tokens must be 16, 32 or 64, not {self.block_tokens}")
        if not 16 <= self.head_dim <= 256 or self.head_dim % 16:
            raise ValueError(f"head_dim must be a multiple of 16 to 256, not {self.head_dim}")

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return self.layers, self.blocks, 2, self.kv_heads, self.block_tokens, self.head_dim

    @property
    def piece_elements(self) -> int:
        return 2 * self.kv_heads * self.block_tokens * self.head_dim

    def allocate(self, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """`shape`, with staging behind it. Zeros: masked lanes may read slots that nobody has
        written, and 0 * NaN is NaN."""
        pieces = self.layers * self.blocks + 2 * self.staging
        memory = torch.zeros(pieces * self.piece_elements, dtype=dtype, device=device)
        return memory[: math.prod(self.shape)].view(self.shape)

    def staged(self, memory: torch.Tensor) -> torch.Tensor:
        """`[2, staging, 2, kv_heads, block_tokens, head_dim]` of what `allocate` has made."""
        shape = (2, self.staging, *self.shape[2:])
        stride = (self.staging * self.piece_elements, *memory.stride()[1:])
        return memory.as_strided(shape, stride, memory.storage_offset() + math.prod(self.shape))

    @property
    def staged_from(self) -> int:
        """`STAGED`, or 0 without staging."""
        return STAGED if self.staging else 0

    def staging_shift(self, layer: int) -> int:
        """What turns the id of a block in staging into its place, in pieces behind the layer's
        first."""
        return (self.layers - layer) * self.blocks + layer % 2 * self.staging - STAGED
