"""Names for the beginnings of prompts, and which backend had each of them last.

    prompt  |== block 0 ==|== block 1 ==|== block 2 ==|= rest
    names   n0 = H(block 0)   n1 = H(blocks 0, 1)   n2 = H(blocks 0, 1, 2)

A prompt that continues an earlier one shares all the names of that one.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

BLOCK_BYTES = 256
"""Some 64 tokens of text."""
INDEX_ENTRIES = 1 << 18
"""About 40 MB when full."""


def names_of(prompt: bytes, model: str = "") -> tuple[bytes, ...]:
    """One for each whole block, shortest beginning first; each model has names of its own."""
    state = blake2b(model.encode(), digest_size=8)
    names = []
    for end in range(BLOCK_BYTES, len(prompt) + 1, BLOCK_BYTES):
        state.update(prompt[end - BLOCK_BYTES : end])
        names.append(state.digest())
    return tuple(names)


class PrefixIndex:
    """Remembers the newest `entries` names; used by one event loop. What it says may be out of
    date: it decides about speed alone."""

    def __init__(self, entries: int = INDEX_ENTRIES) -> None:
        self._entries = entries
        self._last: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def known(self, names: tuple[bytes, ...]) -> tuple[str, ...]:
        """For each the address that had it last, or ""."""
        return tuple(self._last.get(name, "") for name in names)

    def record(self, names: tuple[bytes, ...], address: str) -> None:
        """A prompt with these goes to `address`."""
        for name in reversed(names):  # the shortest are shared by most: they are dropped last
            self._last[name] = address
            self._last.move_to_end(name)
        while len(self._last) > self._entries:
            self._last.popitem(last=False)
