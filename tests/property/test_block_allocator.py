"""The block allocator against a dict of reference counts."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_service.kv.allocator import BlockAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """`tables` is who holds what; the model of the allocator is how often a block occurs there."""

    @initialize(total=st.integers(0, 12))
    def start(self, total: int) -> None:
        self.allocator = BlockAllocator(total)
        self.tables: list[list[int]] = []

    def references(self) -> dict[int, int]:
        counts = dict.fromkeys(range(self.allocator.total), 0)
        for table in self.tables:
            for block in table:
                counts[block] += 1
        return counts

    @rule(count=st.integers(0, 13))
    def allocate(self, count: int) -> None:
        free = [block for block, held in self.references().items() if not held]
        assert self.allocator.can_allocate(count) == (count <= len(free))
        if count > len(free):
            with pytest.raises(AssertionError):
                self.allocator.allocate(count)
            return
        table = self.allocator.allocate(count)
        assert len(set(table)) == count
        assert set(table) <= set(free), "a block in use was handed out"
        self.tables.append(table)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from([table for table in self.tables if table]))
        shared = source[: data.draw(st.integers(1, len(source)))]
        self.allocator.fork(shared)
        self.tables.append(list(shared))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        after = self.references()
        released = self.allocator.free(table)
        assert released == sum(after[block] == 0 for block in table)

    @precondition(lambda self: self.allocator.free_count)
    @rule()
    def free_twice_is_a_bug(self) -> None:
        free = next(block for block, held in self.references().items() if not held)
        with pytest.raises(AssertionError):
            self.allocator.free([free])
        with pytest.raises(AssertionError):
            self.allocator.fork([free])

    @invariant()
    def agrees(self) -> None:
        counts = self.references()
        self.allocator.check_integrity(self.tables)
        assert self.allocator.free_count == sum(not held for held in counts.values())
        assert self.allocator.used_count + self.allocator.free_count == self.allocator.total
        assert all(self.allocator.references(block) == n for block, n in counts.items())


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_integrity_check_finds_a_leak() -> None:
    """The check itself must be able to fail."""
    allocator = BlockAllocator(4)
    table = allocator.allocate(2)
    with pytest.raises(AssertionError):
        allocator.check_integrity([])
    with pytest.raises(AssertionError):
        allocator.check_integrity([table, table])
    allocator.check_integrity([table])
