"""What decode attention is, in float64, one row and one head at a time. No paging, no speed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def decode_attention(
    q: Doubles,
    keys: Sequence[Doubles],
    values: Sequence[Doubles],
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Doubles, Doubles]:
    """Output `[rows, query_heads, head_dim]` and log-sum-exp `[rows, query_heads]`.

    q: like the output. keys, values: per row `[length, kv_heads, head_dim]`; query head h reads KV
    head h // (query_heads / kv_heads). window: tokens seen, counted from the last; 0 means all.
    softcap: scores become cap * tanh(score / cap); 0 means off.
    """
    out, lse = np.empty_like(q), np.empty(q.shape[:2])
    for row, (k, v) in enumerate(zip(keys, values, strict=True)):
        first = max(len(k) - window, 0) if window else 0
        group = q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):
            scores = k[first:, head // group] @ q[row, head] * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            top = scores.max()
            weights = np.exp(scores - top)
            lse[row, head] = top + np.log(weights.sum())
            out[row, head] = weights @ v[first:, head // group] / weights.sum()
    return out, lse
