"""Which KV blocks of one tier are free, how many tables hold each of the others, and which contents
can be found again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from gpu_service.kv.keys import Key


class BlockAllocator:
    """Reference-counted blocks `0 .. total - 1` of one tier's pool.

    Several tables may hold one block; it is free again when the last of them has let go. A block
    whose contents have a name (`publish`) is found by it, also when it is free: it keeps them until
    it is the one that was let go the longest ago and somebody needs room.

        free --allocate--> held --free, nameless or with a twin--> free
                           held --free, named--------------------> idle --fork, found again--> held
                                                                   idle --allocate, no other
                                                                          is free------------> held

    Choices that compute the same tokens at the same time hold blocks with equal contents, *twins*.
    One of them is found. It hands that over to one that is still held when it is let go, so that
    nothing is kept twice, and nothing in use is lost.

    Used by the scheduler's thread alone. Asking for more than there is, or freeing what is not
    held, is our own bug and asserts: ask `can_allocate` first.
    """

    def __init__(self, total: int) -> None:
        assert total >= 0
        self._references = [0] * total
        # A stack: the block freed last is warm in the caches and is used again first.
        self._free = list(range(total - 1, -1, -1))
        # The longest idle first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._keys: dict[int, Key] = {}
        self._found: dict[Key, int] = {}
        # Others with the same name, all of them held.
        self._twins: dict[Key, list[int]] = {}

    @property
    def total(self) -> int:
        return len(self._references)

    @property
    def free_count(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def used_count(self) -> int:
        return self.total - self.free_count

    @property
    def idle_count(self) -> int:
        """Of the free ones, those whose contents can be found."""
        return len(self._idle)

    @property
    def found_count(self) -> int:
        """Blocks whose contents can be found."""
        return len(self._found)

    def can_allocate(self, count: int) -> bool:
        return count <= self.free_count

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, each held once. Their contents are whatever was there before."""
        assert self.can_allocate(count), f"{count} blocks asked for, {self.free_count} free"
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._found[self._keys.pop(block)]
        return block

    def fork(self, blocks: Iterable[int]) -> None:
        """Hold each of `blocks`, which are held already or can be found, once more."""
        for block in blocks:
            if self._references[block] == 0:
                assert block in self._idle, f"block {block} is free and cannot be shared"
                del self._idle[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> int:
        """Let go of each of `blocks` once; returns how many became free by that."""
        before = self.free_count
        # Reversed, so that allocating the same number again gives them in the same order, and that
        # the end of a prefix goes before its beginning, without which it is never looked for.
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} was freed twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._let_go(block)
        return self.free_count - before

    def _let_go(self, block: int) -> None:
        key = self._keys.get(block)
        twins = None if key is None else self._twins.get(key)
        if key is not None and twins is None:
            self._idle[block] = None
            return
        self._free.append(block)
        if key is not None and twins is not None:
            del self._keys[block]
            if self._found[key] == block:
                self._found[key] = twins.pop()
            else:
                twins.remove(block)
            if not twins:
                del self._twins[key]

    def references(self, block: int) -> int:
        return self._references[block]

    # -- contents that can be found --------------------------------------------------------------

    def publish(self, block: int, key: Key) -> None:
        """The block, which is held, has these contents, and will not be written again."""
        assert self._references[block] > 0
        assert block not in self._keys, f"block {block} has a name"
        self._keys[block] = key
        other = self._found.setdefault(key, block)
        if other in self._idle:
            del self._idle[other], self._keys[other]
            self._free.append(other)
            self._found[key] = block
        elif other != block:
            self._twins.setdefault(key, []).append(block)

    def find(self, keys: Iterable[Key]) -> list[int]:
        """Blocks of the longest beginning of `keys` that is there; `fork` holds them."""
        found = []
        for key in keys:
            block = self._found.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def idle_among(self, blocks: Iterable[int]) -> int:
        """How many of these are free: `fork` takes them from what `allocate` can give."""
        return sum(self._references[block] == 0 for block in blocks)

    def forget(self) -> None:
        """No contents can be found any more."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._keys.clear()
        self._found.clear()
        self._twins.clear()

    # -- integrity -------------------------------------------------------------------------------

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that free list and reference counts agree, and with `tables`: that exactly these
        hold the blocks."""
        assert len(set(self._free)) == len(self._free), "a block is on the free list twice"
        free = set(self._free) | self._idle.keys()
        assert len(free) == self.free_count, "a block is free in two ways"
        for block, count in enumerate(self._references):
            assert (count == 0) == (block in free), f"block {block}: {count} references"
        self._check_names()
        if tables is not None:
            held = [0] * self.total
            for table in tables:
                for block in table:
                    held[block] += 1
            assert held == self._references, "blocks leaked, or held by nobody known"

    def _check_names(self) -> None:
        assert not self._keys.keys() & set(self._free), "a free block has contents"
        named: dict[Key, set[int]] = {}
        for block, key in self._keys.items():
            named.setdefault(key, set()).add(block)
        assert named.keys() == self._found.keys(), "contents that nobody finds"
        assert all(self._twins.values())
        for key, blocks in named.items():
            found, twins = self._found[key], self._twins.get(key, [])
            assert sorted([found, *twins]) == sorted(blocks), "twins that do not know each other"
            assert not twins or not blocks & self._idle.keys(), "contents are kept twice"
        assert self._idle.keys() <= set(self._found.values()), "a block is kept for nothing"
        assert sum(map(len, self._twins.values())) + len(self._found) == len(self._keys)
