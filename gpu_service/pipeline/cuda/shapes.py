"""Padded sizes of sweeps: few enough to capture, close enough to what is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpu_service.pipeline.cuda.inputs import SweepShape
from gpu_service.scheduling.plan import SubBatch

_DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Dense layers of Llama-3-8B on an H100 take 5.5-5.8 ms for 1-64 rows, 6.4 for 128, 7.6 for 256,
# 10.9 for 384, 12.9 for 512: the steps of cuBLAS's tiles.
_TOTAL_ROWS = (64, 128, 192, 256, 384, 512)
_CHUNKS = 16
"""Prompt chunks of a captured sweep: padding ones cost an empty program each."""


@dataclass(frozen=True)
class ShapeTable:
    """decode: padded numbers of decode rows, ascending. totals: of all rows where there are prompt
    chunks, ascending. chunks: how many chunks those sweeps hold."""

    decode: tuple[int, ...]
    totals: tuple[int, ...]
    chunks: int

    def captured(self) -> Iterator[SweepShape]:
        """All padded shapes, the largest first, so that later ones fit into its memory."""
        for rows in reversed((0, *self.decode)):
            for total in reversed(self.totals):
                if total > rows:
                    yield SweepShape(rows, total - rows, self.chunks)
            if rows:
                yield SweepShape(rows, 0, 0)

    def shape_for(self, batch: SubBatch) -> SweepShape:
        """The smallest padded shape, or where none is large enough one that fits exactly (with
        padded decode rows, since the decode kernel's workspace depends on them)."""
        rows = len(batch.gpu_decode)
        decode = next(size for size in (0, *self.decode) if size >= rows)
        prefill = sum(len(chunk.token_ids) for chunk in batch.prefill)
        if not prefill:
            return SweepShape(decode, 0, 0)
        if len(batch.prefill) <= self.chunks:
            for total in self.totals:
                if total - decode >= prefill:
                    return SweepShape(decode, total - decode, self.chunks)
        return SweepShape(decode, prefill, len(batch.prefill))


def shape_table(max_running: int) -> ShapeTable:
    """For up to `max_running` decode rows."""
    decode = [size for size in _DECODE_SIZES if size < max_running]
    return ShapeTable((*decode, max_running), _TOTAL_ROWS, _CHUNKS)
