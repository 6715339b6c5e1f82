"""The GPU tier's paged KV cache: a tensor, and what fixes its shape.

    [layers][blocks][K | V][kv_heads][block_tokens][head_dim]

As in the host pool a *piece* (one block of one layer, K and V of all heads) is contiguous: 64 KiB
for Llama-3-8B at 16 tokens, so that demotion moves few large runs. Within a piece a head's tokens
are contiguous, 4 KiB of K that one program of the decode kernel reads in a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GpuKvLayout:
    """Shape of the cache; `block_tokens` is 16, 32 or 64, `head_dim` a multiple of 16 up to 256."""

    layers: int
    blocks: int
    kv_heads: int
    block_tokens: int
    head_dim: int

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
        """Zeros: masked lanes may read slots that nobody has written, and 0 * NaN is NaN."""
        return torch.zeros(self.shape, dtype=dtype, device=device)
