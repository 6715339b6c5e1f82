"""What requests change about the logits before the draw: penalties, bias, muted tokens.

All of it touches few tokens a row, so it works on flat (row, token) pairs, not on masks
`[rows, vocab]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_service.engine.messages import SamplingSpec
from gpu_service.model.structured import Guide, Words

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SamplingRow:
    """One row of logits: who asks for it, and what has been said so far.

    The token drawn is output token number `len(output_token_ids)`, counted from 0. That number is
    the draw's position, and the draw's seed is `spec.seed + choice_index`.
    """

    spec: SamplingSpec
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    choice_index: int = 0
    guide: Guide | None = None
    """Set exactly where the spec has a grammar."""


def adjusted(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    positions: Sequence[int],
    eos_token_ids: Sequence[int],
) -> torch.Tensor:
    """`logits` [rows, vocab] as the rows wish; the argument itself where they wish nothing.
    `positions`: number of the output token that each row draws, counted from 0.

    Order: repetition penalty, frequency and presence penalties, bias, then the tokens masked by
    `min_tokens` and by grammars. A row whose grammar can be followed no further has none left.
    """
    penalised = [i for i, row in enumerate(rows) if is_penalised(row.spec)]
    biased = [i for i, row in enumerate(rows) if row.spec.logit_bias]
    muted = [i for i, row in enumerate(rows) if positions[i] < row.spec.min_tokens]
    guided = [i for i, row in enumerate(rows) if row.guide is not None]
    if not (penalised or biased or muted or guided):
        return logits
    logits = logits.clone()
    flat = logits.view(-1)
    if penalised:
        _penalise(flat, logits.shape[1], rows, penalised)
    for i in biased:
        bias = rows[i].spec.logit_bias
        tokens = _to(logits, np.fromiter(bias, np.int64, len(bias)))
        logits[i, tokens] += _to(logits, np.fromiter(bias.values(), np.float32, len(bias)))
    for i in muted:
        ending = np.array([*eos_token_ids, *rows[i].spec.stop_token_ids], np.int64)
        logits[i, _to(logits, ending)] = float("-inf")
    if guided:
        _mask(logits, rows, guided)
    return logits


def _mask(logits: torch.Tensor, rows: Sequence[SamplingRow], guided: Sequence[int]) -> None:
    """Leave the guided rows what their grammars allow next."""
    vocab = logits.shape[1]
    masks = np.zeros((len(guided), -(-vocab // 32)), np.uint32)
    for mask, i in zip(masks, guided, strict=True):
        guide = rows[i].guide
        assert guide is not None
        allowed: Words | None = guide.allowed(rows[i].output_token_ids)
        if allowed is not None:
            mask[:] = allowed[: len(mask)]  # it may have a word more
    bits = np.unpackbits(masks.view(np.uint8), axis=1, count=vocab, bitorder="little")
    forbidden = _to(logits, bits == 0)
    index = _to(logits, np.array(guided, np.int64))
    logits[index] = logits[index].masked_fill_(forbidden, float("-inf"))


def is_penalised(spec: SamplingSpec) -> bool:
    """Its logits depend on which tokens prompt and output have."""
    return (
        spec.repetition_penalty != 1.0
        or spec.presence_penalty != 0.0
        or spec.frequency_penalty != 0.0
    )


def _penalise(
    flat: torch.Tensor, vocab: int, rows: Sequence[SamplingRow], penalised: Sequence[int]
) -> None:
    """Changes the flat `[rows * vocab]` logits of all tokens that the penalised rows have seen."""
    seen, counts = _history(vocab, rows, penalised)
    row_of = seen // vocab
    specs = [row.spec for row in rows]
    per_row = np.array(
        [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in specs], np.float32
    )
    repetition, frequency, presence = per_row[row_of].T
    lowered = frequency * counts + presence * (counts > 0)
    index = _to(flat, seen)
    values, factor = flat[index], _to(flat, repetition)
    values = torch.where(values > 0, values / factor, values * factor)
    flat[index] = values - _to(flat, lowered.astype(np.float32))


def _history(
    vocab: int, rows: Sequence[SamplingRow], penalised: Sequence[int]
) -> tuple[_Ids, _Ids]:
    """Flat ids of each token in prompt or output, ascending, and how often the output has it."""
    prompts = [_keys(rows[i].prompt_token_ids, i, vocab) for i in penalised]
    outputs = [_keys(rows[i].output_token_ids, i, vocab) for i in penalised]
    output_keys = np.concatenate(outputs)
    seen = np.unique(np.concatenate([*prompts, output_keys]))
    counts = np.bincount(np.searchsorted(seen, output_keys), minlength=len(seen))
    return seen, counts


def _keys(tokens: Sequence[int], row: int, vocab: int) -> _Ids:
    return np.asarray(tokens, np.int64) + row * vocab


def _to(like: torch.Tensor, values: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device)
