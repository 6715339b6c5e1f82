"""`python -m benchmarks.soak` for a minute: a fault of each of some kinds, and a verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_minute_is_survived(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "1", "--seed", "7"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "logs"), "--json", str(out)],
        cwd=REPO, capture_output=True, text=True, timeout=840, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert out.exists(), said
    found = json.loads(out.read_text())
    assert done.returncode == 0, said
    assert found["checked"] > 20, said
    assert len({fault["kind"] for fault in found["faults"]}) >= 2, said
    assert all(check["passed"] for check in found["verdict"])
