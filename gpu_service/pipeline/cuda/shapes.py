"""Padded sizes of sweeps: few enough to capture, close enough to what is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gpu_service.pipeline.cuda.inputs import SweepShape
from gpu_service.scheduling.plan import SubBatch

_DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512)
_BESIDE_CHUNKS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
# Dense layers of Llama-3-8B on an H100 take 5.5-5.8 ms for 1-64 rows, 6.4 for 128, 7.6 for 256,
# 10.9 for 384, 12.9 for 512: the steps of cuBLAS's tiles. 448 rows took 16 ms.
_TOTAL_ROWS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 512)
CAPTURED_ROWS = _TOTAL_ROWS[-1]
"""The most, of sweeps with prompts."""
_EAGER_ROWS = (1024, 2048, 4096, 8192)
CAPTURED_CHUNKS = 16
"""Prompt chunks of a captured sweep: padding ones cost an empty program each."""
_MORE_CHUNKS = (64, 256)
_PAD = 16
"""More host rows than were captured are padded to a multiple of this."""
# With host rows that are waited for, which take a second pass over the weights or wait in each
# layer, padding matters less, and each size multiplies the number of graphs.
_LANE_ROWS = (16, 64, 128, 256)
_BESIDE_LANES = (1, 16, 64)
_LANE_TOTALS = (64, 128, 256, 384)


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
    lanes: tuple[tuple[int, int], ...] = ()
    """Padded numbers of host rows that are waited for, of the first sub-batch and of the second,
    ascending; empty: none ever are. More of them are not captured."""

    @property
    def beside_chunks(self) -> tuple[int, ...]:
        """Padded numbers of decode rows beside prompt chunks, ascending: fewer, since those sweeps
        are padded by their sum."""
        few = [n for n in self.decode[:-1] if n in _BESIDE_CHUNKS]
        return (0, *few, self.decode[-1])

    @property
    def beside_lanes(self) -> tuple[int, ...]:
        """Padded numbers of decode rows beside host rows that are waited for, ascending."""
        return (*(n for n in self.decode[:-1] if n in _BESIDE_LANES), self.decode[-1])

    @property
    def _lane_totals(self) -> tuple[int, ...]:
        """Padded numbers of the first sub-batch's rows beside them, with chunks, ascending; with
        the second sub-batch they are the largest one at most."""
        return (*(n for n in self.totals[:-1] if n in _LANE_TOTALS), self.totals[-1])

    def host_rows(self, max_running: int) -> int:
        """The most host rows of a sweep, padding included."""
        if not self.lanes:
            return self.host
        return max(max(map(sum, self.lanes)), max_running + 2 * _PAD)

    def captured(self) -> Iterator[SweepShape]:
        """All padded shapes, the largest first, so that later ones fit into its memory."""
        for host in sorted({self.host, 0}, reverse=True):
            for shape in self._captured(host):
                yield replace(shape, host=host)
        for lanes in reversed(self.lanes):
            yield from self._captured_with(*lanes)

    def _captured_with(self, first: int, second: int) -> Iterator[SweepShape]:
        for total in reversed(self._lane_totals):
            for rows in (0, *self.beside_lanes):
                if rows + first < total <= self.totals[-1] - second:
                    yield SweepShape(rows, total - first - rows, self.chunks, first, second)
        for rows in self.beside_lanes:
            if rows + first + second <= self.totals[-1]:
                yield SweepShape(rows, 0, 0, first, second)

    def _captured(self, host: int) -> Iterator[SweepShape]:
        for rows in reversed(self.beside_chunks):
            for total in reversed(self.totals):
                if total > rows + host:
                    yield SweepShape(rows, total - host - rows, self.chunks)
        for rows in reversed(self.decode):
            yield SweepShape(rows, 0, 0)

    def shape_for(
        self, batch: SubBatch, *, deferred: bool = False, lanes: Sequence[int] = ()
    ) -> SweepShape:
        """The smallest padded shape, or where none is large enough one that fits exactly (with
        padded decode rows, since the decode kernel's workspace depends on them). `batch`: the first
        sub-batch. `lanes`: host rows that are waited for, by sub-batch."""
        if any(lanes):
            return self._with_lanes(batch, *lanes)
        host = self.host if deferred else 0
        return replace(self._shape_for(batch, host), host=host)

    def _shape_for(self, batch: SubBatch, host: int) -> SweepShape:
        rows, prefill = _own_rows(batch)
        if not prefill:
            return SweepShape(padded(self.decode, rows), 0, 0)
        decode = padded(self.beside_chunks, rows)
        if len(batch.prefill) <= self.chunks:
            for total in self.totals:
                if total - host - decode >= prefill:
                    return SweepShape(decode, total - host - decode, self.chunks)
        return SweepShape(decode, prefill, self._padded_chunks(batch))

    def _with_lanes(self, batch: SubBatch, first: int, second: int = 0) -> SweepShape:
        rows, prefill = _own_rows(batch)
        fitting = (
            lanes
            for lanes in self.lanes
            if first <= lanes[0] and second <= lanes[1] and (second > 0) == (lanes[1] > 0)
        )
        first, second = next(fitting, (_rounded_up(first), _rounded_up(second)))
        if not prefill:
            return SweepShape(padded(self.beside_lanes, rows), 0, 0, first, second)
        decode = padded((0, *self.beside_lanes), rows)
        if len(batch.prefill) <= self.chunks:
            for total in self._lane_totals:
                if prefill + decode + first <= total <= self.totals[-1] - second:
                    return SweepShape(decode, total - first - decode, self.chunks, first, second)
        return SweepShape(decode, prefill, self._padded_chunks(batch), first, second)

    def _padded_chunks(self, batch: SubBatch) -> int:
        sizes = (self.chunks, *self.more_chunks, len(batch.prefill))
        return padded(sizes, len(batch.prefill))


def _own_rows(batch: SubBatch) -> tuple[int, int]:
    """Decode rows that attend on the device, and rows of chunks."""
    prefill = sum(len(chunk.token_ids) for chunk in batch.prefill)
    return len(batch.gpu_decode) + len(batch.streamed), prefill


def _rounded_up(rows: int) -> int:
    return -(-rows // _PAD) * _PAD


def padded(sizes: tuple[int, ...], rows: int) -> int:
    """The smallest of `sizes` (ascending) that holds `rows`."""
    return next(size for size in sizes if size >= rows)


def shape_table(
    max_running: int, max_batch_tokens: int, host: int = 0, lanes: int = 0
) -> ShapeTable:
    """For up to `max_running` decode rows, sweeps of that many tokens, and `host` deferred rows or
    host rows of so many `lanes` that are waited for."""
    eager = tuple(rows for rows in _EAGER_ROWS if rows <= max_batch_tokens)
    decode = [size for size in _DECODE_SIZES if size < max_running]
    more_chunks = tuple(chunks for chunks in _MORE_CHUNKS if chunks <= max_running)
    most = padded((*_LANE_ROWS, max_running), max_running)
    sizes = [size for size in _LANE_ROWS if size <= most] if lanes else []
    pairs = [(size, 0) for size in sizes]
    if lanes > 1:
        pairs += [(size, size) for size in sizes if 2 * size < CAPTURED_ROWS]
    return ShapeTable(
        (*decode, max_running), _TOTAL_ROWS, CAPTURED_CHUNKS, more_chunks, eager, host, tuple(pairs)
    )
