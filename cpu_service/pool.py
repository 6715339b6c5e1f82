"""Host KV pools: how large one may be, and its memory."""

from __future__ import annotations

from collections.abc import Callable

from neo_common.errors import Reason, ServiceError
from neo_common.shm.limits import MemoryHeadroom, memory_headroom
from neo_common.shm.memory import SharedMemory
from neo_common.shm.populate import populate

GIB = 1 << 30


class PoolBudget:
    """Bytes that may still be allocated: what the configuration leaves, and what the machine and
    its cgroups leave."""

    def __init__(
        self, max_bytes: int, headroom: Callable[[], MemoryHeadroom] = memory_headroom
    ) -> None:
        """`max_bytes` over all sessions; 0 means no limit of its own."""
        self._max_bytes = max_bytes
        self._headroom = headroom
        self._used = 0

    @property
    def used_bytes(self) -> int:
        return self._used

    def available(self) -> MemoryHeadroom:
        free, own = self._headroom(), self._own()
        return own if own is not None and own.bytes < free.bytes else free

    def _own(self) -> MemoryHeadroom | None:
        """What the configuration leaves; None when it sets no limit."""
        if self._max_bytes == 0:
            return None
        return MemoryHeadroom(max(self._max_bytes - self._used, 0), "max_pool_gib")

    def take(self, pool_bytes: int, other_bytes: int, exists: bool = False) -> None:
        """Account for a pool. `other_bytes`: what its session needs beside. Raises ServiceError
        when it does not fit.

        `exists`: the engine holds its memory already, so that only the configured limit matters."""
        free = self._own() if exists else self.available()
        if free is not None and pool_bytes + other_bytes > free.bytes:
            raise ServiceError(
                Reason.OUT_OF_HOST_MEMORY,
                f"a host pool of {pool_bytes / GIB:.2f} GiB and {other_bytes / GIB:.2f} GiB of "
                f"step memory do not fit into the {free.bytes / GIB:.2f} GiB that {free.source} "
                "leaves; lower host_kv_gib",
                field="host_blocks",
            )
        self._used += pool_bytes

    def give_back(self, pool_bytes: int) -> None:
        assert pool_bytes <= self._used
        self._used -= pool_bytes


def allocate_pool(size: int, threads: int, cpus: tuple[int, ...]) -> SharedMemory:
    """Zeroed memory for a pool, already backed by pages (huge ones where the kernel gives them).

    Touching it here, from threads pinned as the attention threads will be, puts it on their NUMA
    node, and makes a lack of memory show now and not in the middle of a sweep. Raises
    MemoryError."""
    try:
        memory = SharedMemory.create("neo-kv-pool", size)
    except OSError as error:
        raise MemoryError(error.strerror) from error
    try:
        populate(memory.buffer, cpus, threads)
    except BaseException:
        memory.close()
        raise
    return memory
