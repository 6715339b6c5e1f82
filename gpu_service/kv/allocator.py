"""Which KV blocks of one tier are free, and how many tables hold each of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockAllocator:
    """Reference-counted blocks `0 .. total - 1` of one tier's pool.

    Several tables may hold one block (the choices of a request share the prompt's full blocks); it
    is free again when the last of them has let go. Used by the scheduler's thread alone. Asking for
    more than there is, or freeing what is not held, is our own bug and asserts: ask `can_allocate`
    first.
    """

    def __init__(self, total: int) -> None:
        assert total >= 0
        self._references = [0] * total
        # A stack: the block freed last is warm in the caches and is used again first.
        self._free = list(range(total - 1, -1, -1))

    @property
    def total(self) -> int:
        return len(self._references)

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def used_count(self) -> int:
        return self.total - self.free_count

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, each held once. Their contents are whatever was there before."""
        assert self.can_allocate(count), f"{count} blocks asked for, {len(self._free)} free"
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        for block in taken:
            self._references[block] = 1
        return taken

    def fork(self, blocks: Iterable[int]) -> None:
        """Hold each of `blocks`, which somebody already holds, once more."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free and cannot be shared"
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> int:
        """Let go of each of `blocks` once; returns how many became free by that."""
        before = len(self._free)
        # Reversed, so that allocating the same number again gives them in the same order.
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} was freed twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
        return len(self._free) - before

    def references(self, block: int) -> int:
        return self._references[block]

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that free list and reference counts agree, and with `tables`: that exactly these
        hold the blocks."""
        assert len(set(self._free)) == len(self._free), "a block is on the free list twice"
        free = set(self._free)
        for block, count in enumerate(self._references):
            assert (count == 0) == (block in free), f"block {block}: {count} references"
        if tables is not None:
            held = [0] * self.total
            for table in tables:
                for block in table:
                    held[block] += 1
            assert held == self._references, "blocks leaked, or held by nobody known"
