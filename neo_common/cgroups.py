"""The control groups around this process, v1 and v2: whose limits it is under.

Inside a container the mount may show the process's own group as the top, while /proc/self/cgroup
still gives the path as the host knows it; so folders that are not there are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """One group that this process is in, directly or by its parents."""

    folder: Path
    unified: bool
    """Of the v2 hierarchy; the names of files differ."""


def groups(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> list[Group]:
    """The groups that may limit `controller` ("cpu", "memory"), the innermost of each hierarchy
    first, as far as the mounts show them."""
    found: list[Group] = []
    for controllers, path in _memberships(proc):
        if controllers == "":
            mounts = [cgroups, cgroups / "unified"]
        elif controller in controllers.split(","):
            # cpu and cpuacct are often mounted together, with a link for each.
            mounts = [cgroups / controller]
        else:
            continue
        for mount in mounts:
            found += [Group(folder, controllers == "") for folder in _ancestors(mount, path)]
    return found


def read_words(path: Path) -> list[str]:
    """Of a small file; none where it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def _memberships(proc: Path) -> list[tuple[str, str]]:
    """(controller list, path) of this process; the unified hierarchy has an empty list."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split(":", 2) for line in lines]
    return [(entry[1], entry[2]) for entry in fields if len(entry) == 3]


def _ancestors(mount: Path, group: str) -> list[Path]:
    """The group's folder and all above it, as far as this mount shows them."""
    relative = group.strip("/")
    parts = relative.split("/") if relative else []
    found = [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [folder for folder in found if folder.is_dir()]
