"""What a process holds, by /proc: descriptors by kind, mapped memory files, children."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from tests.support.processes import descendants

POOL = "neo-kv-pool"
"""The name of a host pool's memory file, see cpu_service/pool.py."""


def holdings(pid: int) -> Counter[str]:
    """Kind -> how many of it the process holds: "fd socket", "map neo-step", "child" ...; without
    its connections to this process, which are a test's own."""
    ours = _ports(os.getpid())
    to_us = {f"socket:[{inode}]" for inode, ends in _connections().items() if ends[1] in ours}
    held = Counter(f"fd {_kind(target)}" for target in _descriptors(pid) if target not in to_us)
    held.update(f"map {name}" for name, _ in _mapped(pid))
    held["child"] = len(descendants(pid))
    return held


def pools(pid: int) -> set[int]:
    """Inodes of the host pools that it has mapped: the same inode is the same memory."""
    return {inode for name, inode in _mapped(pid) if name == POOL}


def _mapped(pid: int) -> set[tuple[str, int]]:
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if named := re.search(r" (\d+)\s+/memfd:(neo-\S+)", line):
            found.add((named[2], int(named[1])))
    return found


def _descriptors(pid: int) -> list[str]:
    targets = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            targets.append(os.readlink(entry))
        except OSError:  # closed while we looked
            continue
    return targets


def _kind(target: str) -> str:
    """Without what makes each one different."""
    if target.startswith("/") and not target.startswith("/memfd:"):
        return "file"
    return re.sub(r":\[\d+\]$", "", target.removesuffix(" (deleted)"))


def _connections() -> dict[str, tuple[int, int]]:
    """TCP sockets of this machine: inode -> local and remote port."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            local, remote = (int(field.rpartition(":")[2], 16) for field in fields[1:3])
            found[fields[9]] = (local, remote)
    return found


def _ports(pid: int) -> set[int]:
    """Local ports of a process's TCP sockets."""
    inodes = {target[len("socket:[") : -1] for target in _descriptors(pid) if "socket" in target}
    return {ports[0] for inode, ports in _connections().items() if inode in inodes}
