"""What one token stands for by itself, as log probabilities name it."""

from __future__ import annotations

import re

import tokenizers

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
"""How SentencePiece writes a space in its tokens."""


class TokenBytes:
    """A vocabulary's tokens as bytes: a token may be part of a character, and `decode` of one alone
    loses that, and its leading space. Thread-safe."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._byte_level = "ByteLevel(" in f"{backend.decoder!r} {backend.pre_tokenizer!r}"
        self._alphabet = {character: byte for byte, character in enumerate(_byte_alphabet())}

    def of(self, token_id: int) -> bytes:
        """Empty for an id without a token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level and all(character in self._alphabet for character in token):
            return bytes(self._alphabet[character] for character in token)
        fallback = _BYTE_FALLBACK.fullmatch(token)
        if fallback:
            return bytes([int(fallback[1], 16)])
        return str(token).replace(_SPACE, " ").encode()


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself where it can be
    seen, else one from 256 on, in order (GPT-2's encoder)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(hidden)) for byte in range(256)]
