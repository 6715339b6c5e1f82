"""Log probabilities of the model itself: of the logits before penalties, bias and temperature."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_service.engine.messages import TokenLogprob


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, top: Sequence[int]
) -> list[TokenLogprob]:
    """Log probability and rank (1 is best) of each row's token, and its `top[row]` best ones.

    logits: `[rows, vocab]` fp32, as the model gave them. token_ids: `[rows]` int64.
    Equal logits share the better rank.
    """
    if logits.shape[0] == 0:
        return []
    total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, token_ids[:, None])
    ranks = (logits > chosen).sum(dim=-1) + 1
    width = max(top)
    best = logits.topk(width, dim=-1) if width else None
    best_values = (best.values - total).tolist() if best else [[]] * len(top)
    best_ids = best.indices.tolist() if best else [[]] * len(top)
    per_row = zip(
        token_ids.tolist(),
        (chosen - total)[:, 0].tolist(),
        ranks.tolist(),
        best_ids,
        best_values,
        top,
        strict=True,
    )
    return [
        TokenLogprob(token, value, rank, list(zip(ids[:count], values[:count], strict=True)))
        for token, value, rank, ids, values, count in per_row
    ]
