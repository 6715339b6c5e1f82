"""docs/guarantees.md promises what its tests prove: of the crash matrix all of it, in its words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grpc
import pytest

from neo_common.errors import Reason
from tests.fault.cells import CELLS, TELLING, Cell, End
from tests.support.crash import Who

REPO = Path(__file__).resolve().parents[2]
TEXT = (REPO / "docs" / "guarantees.md").read_text()
STATUSES = {code.name for code in grpc.StatusCode} | set(Reason)


def table(header: str) -> list[list[str]]:
    """The cells of each line of the table that begins so."""
    lines = TEXT.split(f"| {header} | ", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]


MATRIX = table("process")
OTHERS = [*table("who sends it"), *table("what")]


def said(line: int, column: int) -> set[str]:
    """The statuses and reasons there. "The same" is what the column before says, or the line before
    where the line's first promise says so."""
    text = MATRIX[line][column]
    if "the same" not in text:
        return STATUSES & set(re.findall(r"\w+", text))
    return said(line - 1, column) if "the same" in MATRIX[line][2] else said(line, column - 1)


def meant(cell: Cell) -> tuple[End, End, End]:
    """How requests on the host tier, those on the GPU tier, and new calls end."""
    if (cell.who, cell.how) == (Who.ROUTER, "hang"):
        (late,) = cell.ends("late")
        return late, late, cell.row.refused
    return cell.row.host, cell.row.gpu, cell.row.refused


def named_in(line: list[str]) -> list[str]:
    """path::function, or path alone; `::function` is in the file that was named before."""
    names: list[str] = []
    for name in re.findall(r"`([^`]+)`", line[-1]):
        names.append(names[-1].partition("::")[0] + name if name.startswith("::") else name)
    return names


def test_each_failure_of_the_page_is_a_row_of_the_matrix() -> None:
    named = [name for line in MATRIX for name in named_in(line)]
    assert len(named) == len(set(named)) == len(MATRIX)
    assert set(named) == {f"{cell.who}-{cell.how}" for cell in CELLS}


@pytest.mark.parametrize("line", range(len(MATRIX)), ids=lambda line: MATRIX[line][-1].strip("`"))
def test_each_ending_of_the_page_is_what_the_cells_expect(line: int) -> None:
    """A router that is told to end says DRAINING until it has ended, which the matrix waits for."""
    assert len(MATRIX[line]) == 6
    row = MATRIX[line][-1].strip("`")
    for cell in (cell for cell in CELLS if f"{cell.who}-{cell.how}" == row):
        for column, (code, reason) in enumerate(meant(cell), start=2):
            expected = {code.name if code else "", reason} - {""}
            if (row, column) == ("router-term", 4):
                expected |= {"DRAINING"}
            assert said(line, column) == expected, (cell.name, column)


def test_the_page_has_the_number_of_cells() -> None:
    assert f"All {len(CELLS)} cells" in TEXT


@pytest.mark.parametrize("line", OTHERS, ids=lambda line: line[0].strip("- ")[:40])
def test_each_other_line_names_tests_that_are_collected(line: list[str]) -> None:
    assert named_in(line)
    for name in named_in(line):
        where, _, function = name.partition("::")
        # The page says that those without a folder are beside the fuzzers' targets.
        path = REPO / (where if "/" in where else f"tests/fuzz/{where}")
        files = sorted(path.glob("test_*.py")) if path.is_dir() else [path]
        assert files, name
        found = {
            node.name
            for file in files
            if file.name.startswith("test_")
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name.startswith("test_")
        }
        assert function in found if function else found, name


def test_the_default_tier_runs_cells_that_exist() -> None:
    assert {cell.name for cell in CELLS} >= TELLING
