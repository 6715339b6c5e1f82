"""Which of the host pool's blocks a sweep reads into staging and which tokens it puts back, as
`HostRing` and the kernels of `kernels.gpu.host_stream` want to be told. Staging blocks are given
out in order, anew in every sweep: nothing in them outlives a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from gpu_service.kv.table import blocks_for
from gpu_service.pipeline.cuda.host_ring import Brought, Longs
from kernels.gpu.kv_cache import STAGED

Ints = npt.NDArray[np.int32]


def staging_arrays(blocks: int) -> dict[str, tuple[int, type[np.generic]]]:
    """Names, sizes and types of a sweep's arrays with so many blocks in staging."""
    return {
        "stream_pool": (2, np.int64),
        "stream_counts": (3, np.int32),
        "brought": (blocks, np.int32),
        "put": (4 * blocks, np.int32),
    }


class StagedSequences:
    """Collects those of one sweep."""

    def __init__(
        self, arrays: Mapping[str, npt.NDArray[np.generic]], blocks: int, block_tokens: int
    ) -> None:
        self._counts = arrays["stream_counts"]
        self._counts[:] = 0
        self._staged = arrays["brought"]
        self._host = np.empty(blocks, np.int64)
        self._put = arrays["put"].reshape(4, blocks)
        self._blocks = blocks
        self._size = block_tokens
        self._used = self._brought = self._puts = 0

    def place(self, host: Ints, known: int, length: int) -> Ints:
        """A table in staging of a sequence with the host blocks `host`, whose tokens from `known`
        to `length` are computed in this sweep."""
        size, count = self._size, blocks_for(length, self._size)
        first, self._used = self._used, self._used + count
        assert self._used <= self._blocks, "more than staging holds"
        staged: Ints = np.arange(first, first + count, dtype=np.int32)
        read = blocks_for(known, size)
        brought = slice(self._brought, self._brought + read)
        self._host[brought], self._staged[brought] = host[:read], staged[:read]
        self._brought = brought.stop
        fresh = known // size
        put = slice(self._puts, self._puts + count - fresh)
        begins = np.arange(fresh, count, dtype=np.int32) * size
        self._put[0, put], self._put[1, put] = staged[fresh:], host[fresh:count]
        self._put[2, put] = np.maximum(known - begins, 0)
        self._put[3, put] = np.minimum(length - begins, size)
        self._puts = put.stop
        self._counts[:2] = self._brought, self._puts
        return staged + np.int32(STAGED)

    def brought(self, pool: Longs, number: int) -> Brought | None:
        """What the sweep reads of the host pool, if anything; layer l is to be `number + l`. pool:
        its address, and the bytes of one layer of it."""
        if not self._brought:
            return None
        self._counts[2:] = np.array([number], np.int64).astype(np.int32)  # may wrap around
        count, (address, layer_bytes) = self._brought, pool.tolist()
        staged = self._staged[:count].astype(np.int64)
        return Brought(self._host[:count], staged, address, layer_bytes, number)
