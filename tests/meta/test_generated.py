"""What is generated and committed is current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "script", [["-m", "protos.generate"], ["docs/reference.py"], ["docs/errors.py"]]
)
def test_is_current(script: list[str]) -> None:
    if script == ["-m", "protos.generate"]:
        pytest.importorskip("grpc_tools")
    done = subprocess.run(
        [sys.executable, *script, "--check"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
