"""Names for the contents of KV blocks: equal names, equal tokens from the prompt's beginning on.

    key(i) = blake2b( key(i - 1), tokens of block i )       key(-1) = blake2b( salt ), keyed

so a key stands for a whole prefix, and requests with different salts share none. The secret of the
first step is drawn when the engine starts, and nobody hears of it or of a key: whoever looks for
two prompts with one name has nothing to try them on. 16 bytes of a cryptographic hash, 0.5 us a
block (8,000 tokens in 0.3 ms), which is what SHA-256 takes too.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence

KEY_BYTES = 16
SECRET_BYTES = 32

Key = bytes


def root_key(secret: bytes, salt: str) -> Key:
    """What stands before the first block of whoever has this salt."""
    return hashlib.blake2b(salt.encode(), key=secret, digest_size=KEY_BYTES).digest()


class BlockKeys:
    """Keys of the full blocks of one growing sequence of tokens; each is computed once."""

    __slots__ = ("_keys", "_root", "block_tokens")

    def __init__(self, root: Key, block_tokens: int) -> None:
        self._root = root
        self.block_tokens = block_tokens
        self._keys: list[Key] = []

    def copy(self) -> BlockKeys:
        """For another sequence that begins in the same way."""
        other = BlockKeys(self._root, self.block_tokens)
        other._keys = self._keys.copy()
        return other

    def of(self, token_ids: Callable[[int, int], Sequence[int]], blocks: int) -> list[Key]:
        """Keys of the first `blocks` blocks. `token_ids(start, end)`: of the sequence, which only
        ever grows."""
        known, size = len(self._keys), self.block_tokens
        if blocks > known:
            words = array("I", token_ids(known * size, blocks * size))
            assert len(words) == (blocks - known) * size, "tokens that nobody knows yet"
            tokens, width = words.tobytes(), size * words.itemsize
            before = self._keys[-1] if self._keys else self._root
            for start in range(0, len(tokens), width):
                content = before + tokens[start : start + width]
                before = hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
                self._keys.append(before)
        return self._keys[:blocks]
