"""Anonymous memory files that two processes map, and that neither can shrink under the other.

Not files in /dev/shm: a container's /dev/shm is 64 MiB unless somebody says otherwise, a name can
be left behind, and anybody with the name can truncate it, which kills the reader with SIGBUS. A
memfd counts against the memory cgroup alone, disappears with its last descriptor, and is sealed
here against any change of size.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def boot_id() -> str:
    """Identifies this boot of this kernel: equal in two processes exactly when they may share
    memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def round_to_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class SharedMemory:
    """A mapped memory file. Owns the mapping and the descriptor; `close` gives both back.

    `close` while views of `buffer` exist is safe: the mapping then goes with the last view."""

    def __init__(self, fd: int, size: int) -> None:
        """Takes over `fd`, which the caller has checked."""
        self._fd = fd
        self.size = size
        try:
            self.buffer: mmap.mmap = mmap.mmap(fd, size, mmap.MAP_SHARED)
        except OSError:
            os.close(fd)
            raise

    @classmethod
    def create(cls, name: str, size: int) -> SharedMemory:
        """New zeroed memory of at least `size` bytes; `name` shows in /proc/PID/maps."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        size = round_to_pages(size)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, size)

    @classmethod
    def adopt(cls, fd: int, size: int) -> SharedMemory:
        """Map a descriptor that came from a peer. Takes `fd` over, also when it raises.

        Raises ValueError when it is not a memory file of `size` bytes (rounded up to pages), or not
        sealed."""
        size = round_to_pages(size)
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            os.close(fd)
            raise ValueError("the peer's descriptor is not a memory file") from None
        actual = os.fstat(fd).st_size
        if seals & _SEALS != _SEALS or actual != size:
            os.close(fd)
            raise ValueError(
                f"the peer's memory is {actual} bytes with seals {seals:#x}, "
                f"not {size} bytes sealed in size"
            )
        try:
            return cls(fd, size)
        except OSError as error:
            raise ValueError(f"the peer's memory cannot be mapped: {error.strerror}") from error

    @property
    def fd(self) -> int:
        return self._fd

    def identity(self) -> tuple[int, int]:
        """Device and inode: two descriptors of the same memory have the same."""
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino

    def close(self) -> None:
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        # Somebody may still look at it (a KvPool, a channel): then it is unmapped with the last.
        with contextlib.suppress(BufferError):
            self.buffer.close()

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
