"""The blocks that hold one choice's KV, in the order of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that `tokens` tokens need."""
    return -(-tokens // block_tokens)


class BlockTable:
    """Block ids of one choice on one tier: token `t` lives in block `ids[t // block_tokens]`.

    Kept as an int32 array that grows by doubling, so that an iteration's table of all rows is a few
    slice copies. A migration makes a new table; this one then never changes again, so that views of
    it in an older plan stay right.
    """

    __slots__ = ("_ids", "_length")

    def __init__(self, blocks: Sequence[int] = ()) -> None:
        self._ids: npt.NDArray[np.int32] = np.zeros(max(8, len(blocks)), dtype=np.int32)
        self._length = 0
        self.extend(blocks)

    def __len__(self) -> int:
        return self._length

    def extend(self, blocks: Sequence[int]) -> None:
        length = self._length + len(blocks)
        if length > len(self._ids):
            grown = np.zeros(max(length, 2 * len(self._ids)), dtype=np.int32)
            grown[: self._length] = self._ids[: self._length]
            self._ids = grown
        self._ids[self._length : length] = blocks
        self._length = length

    def view(self) -> npt.NDArray[np.int32]:
        """`[blocks]` int32; must not be written."""
        return self._ids[: self._length]

    def tolist(self) -> list[int]:
        ids: list[int] = self.view().tolist()
        return ids


def slots_of(
    blocks: npt.NDArray[np.int32], start: int, count: int, block_tokens: int
) -> npt.NDArray[np.int64]:
    """`[count]` int64: the slots of tokens `start .. start + count - 1`."""
    tokens = np.arange(start, start + count, dtype=np.int64)
    slots: npt.NDArray[np.int64] = (
        blocks[tokens // block_tokens].astype(np.int64) * block_tokens + tokens % block_tokens
    )
    return slots
