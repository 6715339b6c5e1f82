"""Which of the host pool's blocks a sweep reads into staging and which tokens it puts back, as the
kernels of `kernels.gpu.host_stream` want to be told. Staging blocks are given out in order, anew in
every sweep: nothing in them outlives a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from gpu_service.kv.table import blocks_for
from kernels.gpu.kv_cache import STAGED

Ints = npt.NDArray[np.int32]


def staging_arrays(blocks: int) -> dict[str, tuple[int, type[np.generic]]]:
    """Names, sizes and types of a sweep's arrays with so many blocks in staging."""
    return {
        "stream_pool": (2, np.int64),
        "stream_counts": (2, np.int32),
        "gathered": (2 * blocks, np.int32),
        "put": (4 * blocks, np.int32),
    }


class StagedSequences:
    """Collects those of one sweep."""

    def __init__(
        self, arrays: Mapping[str, npt.NDArray[np.generic]], blocks: int, block_tokens: int
    ) -> None:
        self._counts = arrays["stream_counts"]
        self._counts[:] = 0
        self._gathered = arrays["gathered"].reshape(2, blocks)
        self._put = arrays["put"].reshape(4, blocks)
        self._blocks = blocks
        self._size = block_tokens
        self._used = self._gathers = self._puts = 0

    def place(self, host: Ints, known: int, length: int) -> Ints:
        """A table in staging of a sequence with the host blocks `host`, whose tokens from `known`
        to `length` are computed in this sweep."""
        size, count = self._size, blocks_for(length, self._size)
        first, self._used = self._used, self._used + count
        assert self._used <= self._blocks, "more than staging holds"
        staged: Ints = np.arange(first, first + count, dtype=np.int32)
        read = blocks_for(known, size)
        gathered = slice(self._gathers, self._gathers + read)
        self._gathered[0, gathered], self._gathered[1, gathered] = host[:read], staged[:read]
        self._gathers = gathered.stop
        fresh = known // size
        put = slice(self._puts, self._puts + count - fresh)
        begins = np.arange(fresh, count, dtype=np.int32) * size
        self._put[0, put], self._put[1, put] = staged[fresh:], host[fresh:count]
        self._put[2, put] = np.maximum(known - begins, 0)
        self._put[3, put] = np.minimum(length - begins, size)
        self._puts = put.stop
        self._counts[:] = self._gathers, self._puts
        return staged + np.int32(STAGED)
