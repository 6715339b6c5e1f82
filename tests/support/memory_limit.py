"""A memory cgroup around one process, so that the kernel's own out-of-memory killer ends it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Version:
    root: Path
    limit: str
    """File with the limit in bytes."""
    counts: str
    """File with a line `oom_kill N`."""


_VERSIONS = (
    _Version(ROOT, "memory.max", "memory.events"),
    _Version(ROOT / "memory", "memory.limit_in_bytes", "memory.oom_control"),
)


@dataclass
class MemoryLimit:
    """A cgroup that processes can be moved to; what they have already stays charged elsewhere."""

    path: Path
    version: _Version

    def starve(self, pid: int) -> None:
        """From now on any page more than the process has kills it."""
        (self.path / "cgroup.procs").write_text(str(pid))
        (self.path / self.version.limit).write_text("0")

    @property
    def kills(self) -> int:
        """Processes of it that the kernel has killed for memory."""
        lines = (self.path / self.version.counts).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _remove(path: Path) -> None:
    """It is busy for as long as the process that was killed is on its way out."""
    give_up = time.monotonic() + 20
    while True:
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)
        else:
            return


@contextmanager
def memory_limit() -> Iterator[MemoryLimit]:
    """Skips the test where no cgroup can be made (no root, or none of ours)."""
    for version in _VERSIONS:
        path = version.root / f"neo-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            if (path / version.limit).exists():
                yield MemoryLimit(path, version)
                return
        finally:
            _remove(path)
    pytest.skip("no memory cgroup can be made here")
