"""`python -m benchmarks.router` runs: each case in small, with the processes that it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.router import k6
from benchmarks.router.cases import CASES

REPO = Path(__file__).resolve().parents[2]
FAST = {"relay"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES],
)
def test_a_case_runs(case: str, tmp_path: Path) -> None:
    if case == "k6" and k6.binary() is None:
        pytest.skip("k6 is not installed")
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.router", "--small", "--cases", case]
    done = subprocess.run(
        [*command, "--json", str(out)],
        cwd=REPO, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    figures = found["figures"][case]
    assert figures
    assert all(value >= 0 for name, value in figures.items() if "added" not in name), figures
    assert found["machine"]["cpus_allowed"] >= 1
    if case == "killed":
        assert figures["failed_without_token"] == 0
