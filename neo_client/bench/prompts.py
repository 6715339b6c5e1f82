"""Token ids of made-up prompts: a function of the seed and of which part it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PREFIX, _TURN = 0, 1
_SPECIAL = 256
"""Vocabularies keep their special tokens and single bytes in front, most of them."""


class PromptMaker:
    """Draws ids evenly, which no tokenizer would: for speed lengths matter, not words. Prompts that
    are to mean something come from a file."""

    def __init__(self, vocab_size: int, avoid: Sequence[int], prefix_tokens: int, seed: int):
        """`avoid`: the ends of sequences. Nothing is drawn from a vocabulary of nothing."""
        first = _SPECIAL if vocab_size > 2 * _SPECIAL else 1
        allowed = np.setdiff1d(np.arange(first, vocab_size), np.asarray(avoid, dtype=np.int64))
        self._allowed = allowed
        self._prefix_tokens = prefix_tokens
        self._seed = seed

    def prefix(self, number: int) -> list[int]:
        return self._draw(self._prefix_tokens, _PREFIX, number, 0)

    def turn(self, session: int, turn: int, tokens: int) -> list[int]:
        return self._draw(tokens, _TURN, session, turn)

    def _draw(self, tokens: int, *which: int) -> list[int]:
        draw = np.random.default_rng([self._seed, *which])
        assert len(self._allowed)
        ids: list[int] = self._allowed[draw.integers(len(self._allowed), size=tokens)].tolist()
        return ids
