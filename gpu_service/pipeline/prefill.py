"""Attention of prompt chunks: over the chunk's own K and V and those of earlier chunks, read back
from their tier."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from gpu_service.pipeline.device_kv import AttentionGeometry


class ChunkMasks:
    """The masks of one chunk, made once per sweep and window and not for each layer."""

    def __init__(self, start: int, tokens: int, device: torch.device) -> None:
        self._start = start
        self._tokens = tokens
        self._device = device
        self._masks: dict[int, torch.Tensor] = {}

    def context(self, window: int) -> int:
        """How many earlier tokens the chunk's first query still sees."""
        return self._start if window == 0 else min(self._start, window - 1)

    def mask(self, window: int) -> torch.Tensor | None:
        """`[tokens, context + tokens]` bool, True where a query looks; None for plain causal."""
        context = self.context(window)
        if context == 0 and (window == 0 or window >= self._tokens):
            return None
        if window not in self._masks:
            queries = torch.arange(self._tokens, device=self._device)[:, None] + context
            keys = torch.arange(context + self._tokens, device=self._device)
            seen = keys <= queries
            if window:
                seen &= keys > queries - window
            self._masks[window] = seen
        return self._masks[window]


def prefill_attention(
    geometry: AttentionGeometry,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """`[tokens, query_heads, head_dim]` of one chunk.

    `q` `[tokens, query_heads, head_dim]`; `k`, `v` `[context + tokens, kv_heads, head_dim]`;
    `mask` as of `ChunkMasks.mask`. Grouped query heads read their KV head without copies.
    """
    result = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=geometry.scale,
        enable_gqa=geometry.query_heads != geometry.kv_heads,
    )
    return result[0].transpose(0, 1)
