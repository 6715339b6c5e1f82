"""Padded sizes of sweeps: few enough to capture, close enough to what is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpu_service.pipeline.cuda.inputs import SweepShape
from gpu_service.scheduling.plan import SubBatch

_DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512)
_BESIDE_CHUNKS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
# Dense layers of Llama-3-8B on an H100 take 5.5-5.8 ms for 1-64 rows, 6.4 for 128, 7.6 for 256,
# 10.9 for 384, 12.9 for 512: the steps of cuBLAS's tiles. 448 rows took 16 ms.
_TOTAL_ROWS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 512)
_EAGER_ROWS = (1024, 2048, 4096, 8192)
_CHUNKS = 16
"""Prompt chunks of a captured sweep: padding ones cost an empty program each."""
_MORE_CHUNKS = (64, 256)


@dataclass(frozen=True)
class ShapeTable:
    """What is captured, and what is not but comes often."""

    decode: tuple[int, ...]
    """Padded numbers of decode rows, ascending."""
    totals: tuple[int, ...]
    """Padded numbers of all rows, host rows included, where there are prompt chunks, ascending."""
    chunks: int
    """How many chunks those sweeps hold."""
    more_chunks: tuple[int, ...] = ()
    """Padded numbers of chunks in larger sweeps, ascending: each is a variant to compile."""
    eager: tuple[int, ...] = ()
    """Larger sweeps that are timed at start, by their rows."""
    host: int = 0
    """Padded number of host rows in deferred mode; 0: there is no such mode. Each sweep is then
    captured without them and with them."""

    @property
    def beside_chunks(self) -> tuple[int, ...]:
        """Padded numbers of decode rows beside prompt chunks, ascending: fewer, since those sweeps
        are padded by their sum."""
        few = [n for n in self.decode[:-1] if n in _BESIDE_CHUNKS]
        return (0, *few, self.decode[-1])

    def captured(self) -> Iterator[SweepShape]:
        """All padded shapes, the largest first, so that later ones fit into its memory."""
        for host in sorted({self.host, 0}, reverse=True):
            for shape in self._captured(host):
                yield replace(shape, host=host)

    def _captured(self, host: int) -> Iterator[SweepShape]:
        for rows in reversed(self.beside_chunks):
            for total in reversed(self.totals):
                if total > rows + host:
                    yield SweepShape(rows, total - host - rows, self.chunks)
        for rows in reversed(self.decode):
            yield SweepShape(rows, 0, 0)

    def shape_for(self, batch: SubBatch, *, deferred: bool = False) -> SweepShape:
        """The smallest padded shape, or where none is large enough one that fits exactly (with
        padded decode rows, since the decode kernel's workspace depends on them)."""
        host = self.host if deferred else 0
        return replace(self._shape_for(batch, host), host=host)

    def _shape_for(self, batch: SubBatch, host: int) -> SweepShape:
        rows = len(batch.gpu_decode) + len(batch.streamed)
        prefill = sum(len(chunk.token_ids) for chunk in batch.prefill)
        if not prefill:
            return SweepShape(padded(self.decode, rows), 0, 0)
        decode = padded(self.beside_chunks, rows)
        if len(batch.prefill) <= self.chunks:
            for total in self.totals:
                if total - host - decode >= prefill:
                    return SweepShape(decode, total - host - decode, self.chunks)
        sizes = (self.chunks, *self.more_chunks, len(batch.prefill))
        return SweepShape(decode, prefill, padded(sizes, len(batch.prefill)))


def padded(sizes: tuple[int, ...], rows: int) -> int:
    """The smallest of `sizes` (ascending) that holds `rows`."""
    return next(size for size in sizes if size >= rows)


def shape_table(max_running: int, max_batch_tokens: int, host: int = 0) -> ShapeTable:
    """For up to `max_running` decode rows, sweeps of that many tokens, and `host` host rows."""
    eager = tuple(rows for rows in _EAGER_ROWS if rows <= max_batch_tokens)
    decode = [size for size in _DECODE_SIZES if size < max_running]
    more_chunks = tuple(chunks for chunks in _MORE_CHUNKS if chunks <= max_running)
    return ShapeTable((*decode, max_running), _TOTAL_ROWS, _CHUNKS, more_chunks, eager, host)
