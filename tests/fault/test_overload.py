"""`python -m benchmarks.overload` in short: goodput holds, refusals say what they must, it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_overload_is_refused_and_what_is_taken_is_served(tmp_path: Path) -> None:
    """Times are generous: the machine may do other things. Goodput is the sleeping engine's."""
    out = tmp_path / "overload.json"
    command = [sys.executable, "-m", "benchmarks.overload", "--json", str(out)]
    options = "--seconds 15 --loads 8 --mixes usual cancels --cancels 100"
    options += " --refusal-ms 10000 --recovery 60"
    done = subprocess.run(
        [*command, *options.split()],
        cwd=REPO, capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    usual, _ = json.loads(out.read_text())["phases"]
    assert usual["ends"].get("RESOURCE_EXHAUSTED/QUEUE_FULL", 0) > usual["ends"]["OK"], said
