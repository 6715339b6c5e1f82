"""docs/guarantees.md promises what the crash matrix proves, and all of it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.fault.cells import CELLS, TELLING

REPO = Path(__file__).resolve().parents[2]


def test_each_failure_of_the_page_is_a_row_of_the_matrix() -> None:
    text = (REPO / "docs" / "guarantees.md").read_text()
    named = re.findall(r"\| `(\w+-\w+)` \|$", text, flags=re.M)
    assert len(named) == len(set(named))
    assert set(named) == {f"{cell.who}-{cell.how}" for cell in CELLS}


def test_each_ending_of_the_page_is_what_the_cells_expect() -> None:
    text = (REPO / "docs" / "guarantees.md").read_text()
    for line in text.splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")]
        if len(columns) != 6 or not columns[-1].startswith("`") or "the same" in columns[2]:
            continue
        for cell in CELLS:
            if f"`{cell.who}-{cell.how}`" == columns[-1] and cell.row.host[1]:
                assert cell.row.host[1] in columns[2]


def test_the_default_tier_runs_cells_that_exist() -> None:
    assert {cell.name for cell in CELLS} >= TELLING
