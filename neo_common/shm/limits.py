"""How much memory this process may still allocate: the machine's and that of every cgroup around
it, v1 and v2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MemoryHeadroom:
    """Bytes that can still be allocated, and what sets that limit."""

    bytes: int
    source: str


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(path: Path, key: str) -> int:
    """Page cache that the kernel drops before it refuses memory."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == key), 0)


def _ancestors(mount: Path, group: str) -> list[Path]:
    """The group's folder and all above it, as far as this mount shows them."""
    relative = group.strip("/")
    parts = relative.split("/") if relative else []
    found = [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [folder for folder in found if folder.is_dir()]


def _groups(proc: Path) -> list[tuple[str, str]]:
    """(controller list, path) of this process; the unified hierarchy has an empty list."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split(":", 2) for line in lines]
    return [(entry[1], entry[2]) for entry in fields if len(entry) == 3]


def memory_headroom(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> MemoryHeadroom:
    """The tightest of MemAvailable and each cgroup's limit minus its usage (page cache does not
    count as used)."""
    available = 0
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    tightest = MemoryHeadroom(available, "the machine's available memory")
    for controllers, group in _groups(proc):
        if controllers == "":
            mounts, limit, usage, cache = (
                [cgroups, cgroups / "unified"],
                "max",
                "current",
                "inactive_file",
            )
        elif "memory" in controllers.split(","):
            mounts, limit = [cgroups / "memory"], "limit_in_bytes"
            usage, cache = "usage_in_bytes", "total_inactive_file"
        else:
            continue
        for mount in mounts:
            for folder in _ancestors(mount, group):
                maximum = _read_int(folder / f"memory.{limit}")
                used = _read_int(folder / f"memory.{usage}")
                if maximum is None or used is None:
                    continue
                free = maximum - max(used - _reclaimable(folder / "memory.stat", cache), 0)
                if free < tightest.bytes:
                    tightest = MemoryHeadroom(max(free, 0), "the memory limit of this container")
    return tightest
