"""Readers of /proc, /sys and control groups. Each takes the roots, so that tests can show it any
machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neo_common.cgroups import CGROUPS, PROC, groups, read_words

CPU_FLAGS = ("avx2", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16")


@dataclass(frozen=True)
class Roots:
    """Where the kernel's files are."""

    proc: Path = PROC
    cgroups: Path = CGROUPS
    sys: Path = Path("/sys")
    shm: Path = Path("/dev/shm")


def read(path: Path) -> str:
    """Empty where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def number(path: Path) -> int | None:
    """None where there is no such file, or no number in it."""
    words = read_words(path)
    return int(words[0]) if words and words[0].lstrip("-").isdigit() else None


def numbers_of(text: str) -> tuple[int, ...]:
    """Of a list as the kernel writes it: `0-3,8,10-11`."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        if first.isdigit():
            found += range(int(first), int(last if dash else first) + 1)
    return tuple(found)


def chosen(path: Path) -> str:
    """The bracketed word of a sysfs setting such as `always [madvise] never`."""
    words = [word[1:-1] for word in read(path).split() if word.startswith("[")]
    return words[0] if words else ""


def meminfo(text: str) -> dict[str, int]:
    """Name -> number, kB where there is a unit; also of a NUMA node's (`Node 0 MemTotal: ...`)."""
    found = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and value.split():
            found[name.split()[-1]] = int(value.split()[0])
    return found


def cpu_flags(roots: Roots) -> tuple[str, ...]:
    """Those instruction sets of `CPU_FLAGS` that the first core has."""
    for line in read(roots.proc / "cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return tuple(sorted(set(value.split()) & set(CPU_FLAGS)))
    return ()


def allowed(roots: Roots, what: str) -> tuple[int, ...]:
    """`Cpus` or `Mems` that this process may use: its cpuset and its own mask together."""
    for line in read(roots.proc / "self/status").splitlines():
        if line.startswith(f"{what}_allowed_list:"):
            return numbers_of(line.partition(":")[2])
    return ()


def cpu_quota(roots: Roots) -> float | None:
    """CPUs' worth of time: the tightest limit of the groups around this process."""
    quotas = []
    for group in groups("cpu", roots.proc, roots.cgroups):
        if group.unified:
            words = read_words(group.folder / "cpu.max")
        else:
            words = read_words(group.folder / "cpu.cfs_quota_us")
            words += read_words(group.folder / "cpu.cfs_period_us")
        # No limit is "max" or -1.
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def group_limit(roots: Roots, controller: str, v2: str, v1: str, most: int) -> int | None:
    """The tightest number in the files of that name around this process; `most` and above, as
    cgroup v1 says "no limit", count as none."""
    limits = []
    for group in groups(controller, roots.proc, roots.cgroups):
        limit = number(group.folder / (v2 if group.unified else v1))
        if limit is not None and limit < most:
            limits.append(limit)
    return min(limits, default=None)


def resource_limit(roots: Roots, name: str) -> int | None:
    """The soft limit of this process; None: unlimited."""
    for line in read(roots.proc / "self/limits").splitlines():
        if line.startswith(name):
            soft = line[len(name) :].split()[0]
            return int(soft) if soft.isdigit() else None
    return None
