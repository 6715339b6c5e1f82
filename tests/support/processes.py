"""Looks at processes by /proc, for tests that start commands."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def parents() -> dict[int, int]:
    """Process -> its parent, of all live ones (zombies left out)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        if fields[0] != "Z":
            found[int(stat.parent.name)] = int(fields[1])
    return found


def descendants(root: int) -> set[int]:
    """Everything that `root` started, and what that started."""
    parent_of = parents()
    family: set[int] = {root}
    while True:
        more = {pid for pid, parent in parent_of.items() if parent in family} - family
        if not more:
            return family - {root}
        family |= more


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def find_service(root: int, module: str) -> int:
    """The process below `root` that was started as service `module`."""
    found = [pid for pid in descendants(root) if module in command_line(pid)]
    assert len(found) == 1, f"{len(found)} processes run {module}"
    return found[0]


def suspend(pid: int, seconds: float = 20.0) -> None:
    """SIGSTOP, and wait until every thread has stopped: one that computes on another CPU goes on
    for a moment."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + seconds
    while any(
        stat.read_text().rpartition(")")[2].split()[0] not in "TtZX"
        for stat in Path(f"/proc/{pid}/task").glob("*/stat")
    ):
        assert time.monotonic() < deadline, "the process does not stop"
        time.sleep(0.001)


def wait_gone(pids: set[int], seconds: float = 20.0) -> None:
    """Until none of `pids` is alive. They need not be our children: there is nothing to wait on."""
    deadline = time.monotonic() + seconds
    while alive := pids & set(parents()):
        assert time.monotonic() < deadline, f"still alive: {[command_line(p) for p in alive]}"
        time.sleep(0.05)
