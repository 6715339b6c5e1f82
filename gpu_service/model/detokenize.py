"""Turning a growing list of tokens into text without ever taking a character back."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes; this bounds the work for a model that emits broken ones.
_MAX_PENDING = 64
# Tokens of the prompt that decide how the first output token reads: its leading space.
_CONTEXT = 6


class DetokenizeStream:
    """Text of one choice, piece by piece. The pieces and `flush` together are the whole text.

    A token alone cannot be decoded: leading spaces and multi-byte characters depend on the tokens
    before it. So a window is decoded that begins before what is new, and what ends in U+FFFD, which
    may be half a character, is held back. (`tokenizers.decoders.DecodeStream` does likewise, but
    never gives out a last half character, and raises on some byte-fallback sequences.)

        window   [ context: already given out | pending ]
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt_token_ids[-_CONTEXT:])
        self._pending = 0
        self._given = len(self._text())

    def step(self, token_id: int) -> str:
        """The text that `token_id` makes certain; often empty, or more than the token's own."""
        self._window.append(token_id)
        self._pending += 1
        text = self._text()
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        if held and self._pending < _MAX_PENDING:
            piece = text[self._given : len(text) - held]
            self._given = max(self._given, len(text) - held)
            return piece
        piece = text[self._given :]
        self._advance(len(text))
        return piece

    def flush(self) -> str:
        """What is still held back, at the end of the output."""
        text = self._text()
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece

    def _advance(self, length: int) -> None:
        """Keep only the newest tokens as context, if they show up in text at all."""
        context = self._window[-self._pending :]
        shown = len(self._decode(context))
        if shown:
            self._window, self._given = context, shown
        else:
            self._given = length
        self._pending = 0

    def _text(self) -> str:
        return self._decode(self._window)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        return text
