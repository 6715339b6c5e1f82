"""Back memory with pages before it is used."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_CHUNK_BYTES = 64 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _populate_chunk(address: int, size: int, cpu: int | None) -> None:
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})  # of this thread: its node is where the pages come from
    # One system call a chunk, without the interpreter's lock; unlike a touch, it reports a lack of
    # memory instead of killing the process.
    if _libc.madvise(address, size, _MADV_POPULATE_WRITE) == 0:
        return
    code = ctypes.get_errno()
    if code != errno.EINVAL:
        raise MemoryError(os.strerror(code))
    ctypes.memset(address, 0, size)  # Linux before 5.14


def populate(memory: mmap.mmap, cpus: Sequence[int] = (), threads: int = 1) -> None:
    """Give fresh, zeroed `memory` its pages: huge ones where the kernel has them, on the NUMA nodes
    of `cpus` (empty: wherever the threads happen to run). Raises MemoryError when there are not
    enough."""
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    start, size = ctypes.addressof(view), len(memory)
    _libc.madvise(start, size, _MADV_HUGEPAGE)  # a wish; refused where shmem_enabled says never
    with ThreadPoolExecutor(threads, thread_name_prefix="neo-populate") as pool:
        chunks = [
            pool.submit(
                _populate_chunk,
                start + offset,
                min(_CHUNK_BYTES, size - offset),
                cpus[index % len(cpus)] if cpus else None,
            )
            for index, offset in enumerate(range(0, size, _CHUNK_BYTES))
        ]
        for chunk in chunks:
            chunk.result()
