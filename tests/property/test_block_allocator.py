"""The block allocator against dicts: who holds what, what blocks contain, who was let go when."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from gpu_service.kv import allocator as allocator_module
from gpu_service.kv.allocator import BlockAllocator
from tests.support.mutants import mutated

OFTEN, SELDOM = ("begin", "free", "publish"), ("allocate", "fork", "forget", "misuse")
ACTIONS = (*OFTEN * 4, *SELDOM)
SEQUENCES = st.sampled_from(["aaab", "aaba", "aab", "a", "ba"])


@dataclass
class Table:
    """Blocks of a sequence of letters, a letter a block; a block's name is the sequence so far."""

    sequence: str
    blocks: list[int]
    published: int = 0

    def key(self, place: int) -> bytes:
        return self.sequence[: place + 1].encode()


class AllocatorMachine(RuleBasedStateMachine):
    @initialize(total=st.sampled_from([12, 8, 6, 0]))
    def start(self, total: int) -> None:
        self.allocator = BlockAllocator(total)
        self.tables: list[Table] = []
        self.names: dict[int, bytes] = {}
        """Of blocks that are held."""
        self.idle: list[bytes] = []
        """Names of blocks that are not held, the longest unused first."""

    def references(self) -> dict[int, int]:
        counts = dict.fromkeys(range(self.allocator.total), 0)
        for table in self.tables:
            for block in table.blocks:
                counts[block] += 1
        return counts

    @property
    def findable(self) -> set[bytes]:
        return {*self.names.values(), *self.idle}

    @rule(action=st.sampled_from(ACTIONS), data=st.data())
    def act(self, action: str, data: st.DataObject) -> None:
        """One rule for all, since Hypothesis leaves out whole rules in most of its runs."""
        getattr(self, action)(data)

    def begin(self, data: st.DataObject) -> None:
        """A sequence takes what is there of it, and room for the rest; some of that is computed."""
        sequence, computed = data.draw(SEQUENCES), data.draw(st.integers(0, 3))
        table = Table(sequence, [])
        keys = [table.key(place) for place in range(len(sequence))]
        found = self.allocator.find(keys)
        there = next((i for i, key in enumerate(keys) if key not in self.findable), len(keys))
        assert len(found) == there
        free = [block for block, held in self.references().items() if not held]
        assert self.allocator.idle_among(found) == sum(block in free for block in found)
        count = len(sequence) - there
        possible = count <= len(free) - self.allocator.idle_among(found)
        self.allocator.fork(found)
        self.idle = [key for key in self.idle if key not in keys[:there]]
        self.names.update(zip(found, keys, strict=False))
        table.blocks, table.published = found, there
        self.tables.append(table)
        assert self.allocator.can_allocate(count) == possible
        if possible:
            table.blocks = found + self.take(count)
            self.compute(table, min(there + computed, len(sequence)))

    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, 13))
        free = [block for block, held in self.references().items() if not held]
        assert self.allocator.can_allocate(count) == (count <= len(free))
        if count > len(free):
            with pytest.raises(AssertionError):
                self.allocator.allocate(count)
            return
        self.tables.append(Table("", self.take(count)))

    def take(self, count: int) -> list[int]:
        free = [block for block, held in self.references().items() if not held]
        taken = self.allocator.allocate(count)
        assert len(set(taken)) == count
        assert set(taken) <= set(free), "a block in use was handed out"
        del self.idle[: max(0, count - (len(free) - len(self.idle)))]
        return taken

    @property
    def incomplete(self) -> list[Table]:
        return [t for t in self.tables if t.published < min(len(t.sequence), len(t.blocks))]

    def publish(self, data: st.DataObject) -> None:
        if not self.incomplete:
            return
        table = data.draw(st.sampled_from(self.incomplete))
        end = data.draw(
            st.integers(table.published + 1, min(len(table.sequence), len(table.blocks)))
        )
        self.compute(table, end)

    def compute(self, table: Table, end: int) -> None:
        for place in range(table.published, end):
            block, key = table.blocks[place], table.key(place)
            self.allocator.publish(block, key)
            self.names[block] = key
            self.idle = [other for other in self.idle if other != key]
            with pytest.raises(AssertionError):
                self.allocator.publish(block, key)
        table.published = end

    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(self.tables)) if self.tables else Table("", [])
        if not source.blocks:
            return
        shared = source.blocks[: data.draw(st.integers(1, len(source.blocks)))]
        self.allocator.fork(shared)
        self.tables.append(Table("", list(shared)))

    def free(self, data: st.DataObject) -> None:
        if not self.tables:
            return
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        after = self.references()
        released = self.allocator.free(table.blocks)
        assert released == sum(after[block] == 0 for block in table.blocks)
        for block in reversed(table.blocks):
            if not after[block] and block in self.names:
                key = self.names.pop(block)
                if key not in self.names.values():
                    self.idle.append(key)

    def forget(self, data: st.DataObject) -> None:
        if len(self.idle) < 3:  # else there would rarely be any
            return
        self.allocator.forget()
        self.names.clear()
        self.idle.clear()
        for table in self.tables:  # whoever was there begins anew
            table.sequence, table.published = "", 0

    def misuse(self, data: st.DataObject) -> None:
        free = [block for block, held in self.references().items() if not held]
        for block in free:
            with pytest.raises(AssertionError):
                self.allocator.free([block])
        idle = {block for key in self.idle for block in self.allocator.find([key])}
        for block in set(free) - idle:
            with pytest.raises(AssertionError):
                self.allocator.fork([block])

    def teardown(self) -> None:
        """To the last block: who was let go first is evicted first."""
        for _ in range(self.allocator.free_count):
            self.tables.append(Table("", self.take(1)))
            self.agrees()

    @invariant()
    def agrees(self) -> None:
        counts = self.references()
        self.allocator.check_integrity([table.blocks for table in self.tables])
        assert self.allocator.free_count == sum(not held for held in counts.values())
        assert self.allocator.used_count + self.allocator.free_count == self.allocator.total
        assert all(self.allocator.references(block) == n for block, n in counts.items())
        for key in self.findable:
            found = self.allocator.find([key])
            assert len(found) == 1, "contents were lost"
            block = found[0]
            assert self.names.get(block, key) == key, "other contents were found"
            assert (counts[block] == 0) == (key in self.idle)
        assert self.allocator.found_count == len(self.findable)

    @invariant()
    def beginnings_outlive_ends(self) -> None:
        """Whatever can be found is reached from the beginning of its sequence."""
        assert all(key[:-1] in self.findable for key in self.findable if len(key) > 1)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_integrity_check_finds_a_leak() -> None:
    """The check itself must be able to fail."""
    allocator = BlockAllocator(4)
    table = allocator.allocate(2)
    with pytest.raises(AssertionError):
        allocator.check_integrity([])
    with pytest.raises(AssertionError):
        allocator.check_integrity([table, table])
    allocator.check_integrity([table])


def test_equal_contents_are_kept_once() -> None:
    allocator = BlockAllocator(4)
    first, second = allocator.allocate(2)
    allocator.publish(first, b"a")
    allocator.publish(second, b"a")
    assert allocator.find([b"a"]) == [first]
    allocator.free([first])
    assert allocator.find([b"a"]) == [second]
    allocator.allocate(3)
    assert allocator.find([b"a"]) == [second], "it is in use, and can be shared"
    allocator.free([second])
    assert allocator.find([b"a"]) == [second]
    assert allocator.idle_among([second]) == 1


MUTANTS = [
    ("for block in reversed(blocks):", "for block in blocks:"),
    ("if self._free else self._evict()", "if not self._idle else self._evict()"),
    ("popitem(last=False)", "popitem()"),
    ("            self._found[key] = block\n", "            pass\n"),
    ("self._found[key] = twins.pop()", "twins.pop(), self._found.pop(key)"),
    ("del self._found[self._keys.pop(block)]", "self._keys.pop(block)"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_found(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = mutated(allocator_module, old, new, tmp_path)
    monkeypatch.setitem(globals(), "BlockAllocator", wrong.BlockAllocator)
    plain = settings(
        TestAllocator.settings,
        max_examples=1000,  # it stops at the first that fails
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate],
    )
    with pytest.raises((AssertionError, KeyError, IndexError)):
        run_state_machine_as_test(AllocatorMachine, settings=plain)
