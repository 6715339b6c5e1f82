"""Files and functions stay small enough to read at a sitting."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 400
MAX_TEST_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def tracked(*patterns: str) -> list[Path]:
    """Files of ours that git knows, without generated ones."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=REPO, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name and "_pb2" not in name]
    return [REPO / name for name in names if (REPO / name).exists()]


def test_files() -> None:
    long = []
    for path in tracked("*.py", "*.cpp", "*.hpp", "*.proto"):
        lines = len(path.read_text().splitlines())
        name = path.relative_to(REPO)
        limit = MAX_TEST_FILE_LINES if name.parts[0] == "tests" else MAX_FILE_LINES
        if lines > limit:
            long.append(f"{name}: {lines} lines, at most {limit}")
    assert not long, "\n".join(long)


def test_functions() -> None:
    """Counted from `def` to the last line; docstrings count."""
    long = []
    for path in tracked("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(
                        f"{path.relative_to(REPO)}:{node.lineno} {node.name}: {lines} lines"
                    )
    assert not long, "\n".join(long)
