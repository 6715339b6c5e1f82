"""How many threads attention should have here, and where: what cpuset and CFS quota leave."""

from __future__ import annotations

import os
from pathlib import Path

_SPARED_CPUS = 2
"""Left to the engine and the front end: on a 16-vCPU host 16 of 16 threads read 108 GB/s, 14 read
139 (one late thread holds all others up)."""

_CGROUP = Path("/sys/fs/cgroup")


def allowed_threads(cgroup: Path = _CGROUP) -> int:
    """Allowed CPUs, and no more than the CFS quota pays for."""
    threads = len(os.sched_getaffinity(0))
    quota = quota_cpus(cgroup)
    return threads if quota is None else max(min(threads, int(quota)), 1)


def default_threads(cgroup: Path = _CGROUP) -> int:
    """Allowed CPUs minus two, at least one, and no more than the CFS quota pays for."""
    spared = max(len(os.sched_getaffinity(0)) - _SPARED_CPUS, 1)
    return min(spared, allowed_threads(cgroup))


def default_cpus(cgroup: Path = _CGROUP) -> tuple[int, ...]:
    """The CPUs to pin those threads to: the highest allowed numbers, since system work gathers on
    the lowest."""
    return tuple(sorted(os.sched_getaffinity(0))[-default_threads(cgroup) :])


def quota_cpus(cgroup: Path = _CGROUP) -> float | None:
    """CPUs' worth of time that this process's cgroup and its parents may use; None: no quota.

    Reads cgroup v2 `cpu.max` along the path in /proc/self/cgroup, else v1 `cpu.cfs_quota_us`.
    """
    limits = [limit for folder in _folders(cgroup) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _folders(cgroup: Path) -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    paths = [line.split(":", 2) for line in lines]
    folders = [cgroup, cgroup / "cpu"]
    for _, controllers, path in (parts for parts in paths if len(parts) == 3):
        if controllers == "":
            root = cgroup
        elif "cpu" in controllers.split(","):
            root = cgroup / "cpu"
        else:
            continue
        folder = root / path.lstrip("/")
        folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    return folders


def _limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        if quota == "max" or int(quota) <= 0:
            return None
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None
