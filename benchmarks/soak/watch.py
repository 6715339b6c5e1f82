"""What processes hold, by /proc."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak.fleet import Fleet

_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Held:
    """One process at one time. Memory in MiB."""

    at: float
    """Seconds since the start of the run."""
    name: str
    """Of the service; `/core` behind it: its engine core."""
    pid: int
    rss: float
    pss: float
    heap: float
    """Anonymous memory, its own: what leaks in."""
    fds: int
    memfds: int
    threads: int
    cpu_seconds: float


def core_of(pid: int) -> int | None:
    """The one child of a gpu_service; None while there is none."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:
            continue
        if found:
            return int(found[0])
    return None


def look(fleet: Fleet, at: float) -> list[Held]:
    """All live processes of the fleet, and this one."""
    found = [_held(at, "client", os.getpid())]
    for service in fleet.services:
        if not service.alive:
            continue
        found.append(_held(at, service.name, service.pid))
        if service in fleet.gpus and (core := core_of(service.pid)) is not None:
            found.append(_held(at, f"{service.name}/core", core))
    return [held for held in found if held is not None]


def _held(at: float, name: str, pid: int) -> Held | None:
    """None when it has ended meanwhile."""
    folder = Path(f"/proc/{pid}")
    try:
        memory = {
            line.split(":")[0]: int(line.split()[1]) / 1024
            for line in (folder / "smaps_rollup").read_text().splitlines()[1:]
        }
        links = _links(folder / "fd")
        status = (folder / "status").read_text()
        times = (folder / "stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError, ValueError):
        return None
    threads = next(line for line in status.splitlines() if line.startswith("Threads:"))
    return Held(
        at=round(at, 1), name=name, pid=pid,
        rss=round(memory["Rss"], 2), pss=round(memory["Pss"], 2),
        heap=round(memory["Anonymous"], 2),
        fds=len(links), memfds=sum("memfd:" in link for link in links),
        threads=int(threads.split()[1]),
        cpu_seconds=(int(times[11]) + int(times[12])) / _TICK,
    )  # fmt: skip


def _links(folder: Path) -> list[str]:
    """Of open descriptors; without one that is closed meanwhile, such as that of the listing."""
    found = []
    for entry in folder.iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(entry))
    return found


def probe_ms() -> float:
    """A fixed piece of work: how fast this machine is now, beside whatever else it does."""
    began = time.perf_counter()
    total = 0
    for number in range(300_000):
        total += number & 7
    return 1e3 * (time.perf_counter() - began)
