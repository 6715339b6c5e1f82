"""Real English prompts of given lengths, from the manual that every Python carries."""

from __future__ import annotations

from collections.abc import Sequence
from pydoc_data.topics import topics

from gpu_service.model.tokenizer import Tokenizer

LENGTHS = (
    10,
    16,
    17,
    25,
    33,
    48,
    64,
    90,
    120,
    160,
    200,
    256,
    300,
    400,
    512,
    640,
    800,
    1000,
    1250,
    1500,
)
"""Twenty prompts from 10 to 1,500 tokens, some at block boundaries."""


def real_prompts(tokenizer: Tokenizer, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """One prompt for each length in tokens, each from another place of the manual."""
    text = "\n".join(topics[name] for name in sorted(topics))
    start, prompts = 0, []
    for length in lengths:
        # A token is at least one byte here, so this is text enough.
        ids = tokenizer.encode(text[start : start + 8 * length + 64])
        assert len(ids) >= length
        prompts.append(ids[:length])
        start += 20_000
    return prompts
