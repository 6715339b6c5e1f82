"""How much memory this process may still allocate: the machine's and that of every cgroup around
it, v1 and v2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neo_common.cgroups import CGROUPS, PROC, groups, read_words


@dataclass(frozen=True)
class MemoryHeadroom:
    """Bytes that can still be allocated, and what sets that limit."""

    bytes: int
    source: str


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def _read_int(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    words = read_words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def _reclaimable(path: Path, key: str) -> int:
    """Page cache that the kernel drops before it refuses memory."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == key), 0)


def memory_headroom(proc: Path = PROC, cgroups: Path = CGROUPS) -> MemoryHeadroom:
    """The tightest of MemAvailable and each cgroup's limit minus its usage (page cache does not
    count as used)."""
    available = 0
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    tightest = MemoryHeadroom(available, "the machine's available memory")
    for group in groups("memory", proc, cgroups):
        folder = group.folder
        limit, usage, cache = _V2 if group.unified else _V1
        maximum, used = _read_int(folder / limit), _read_int(folder / usage)
        if maximum is None or used is None:
            continue
        free = maximum - max(used - _reclaimable(folder / "memory.stat", cache), 0)
        if free < tightest.bytes:
            tightest = MemoryHeadroom(max(free, 0), "the memory limit of this container")
    return tightest
