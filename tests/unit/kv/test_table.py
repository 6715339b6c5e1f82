"""Block tables and slots."""

from __future__ import annotations

import numpy as np

from gpu_service.kv.table import BlockTable, blocks_for, slots_of


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(n, 16) for n in (0, 1, 15, 16, 17, 32)] == [0, 1, 1, 1, 2, 2]


def test_table_grows_and_keeps_order() -> None:
    table = BlockTable([5, 3])
    for block in range(100, 140):
        table.extend([block])
    assert table.tolist() == [5, 3, *range(100, 140)]
    assert len(table) == 42
    assert table.view().dtype == np.int32


def test_view_of_an_older_plan_stays_right_while_the_table_grows() -> None:
    table = BlockTable([1, 2, 3])
    view = table.view()
    table.extend(range(50))
    assert view.tolist() == [1, 2, 3]


def test_slots_follow_the_table() -> None:
    blocks = np.array([7, 2, 9], dtype=np.int32)
    slots = slots_of(blocks, 3, 6, 4)
    assert slots.tolist() == [31, 8, 9, 10, 11, 36]
    assert slots.dtype == np.int64
    assert slots_of(blocks, 0, 0, 4).tolist() == []
