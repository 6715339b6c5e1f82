"""Sweeps as CUDA graphs: one launch instead of some 300."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch

from gpu_service.pipeline.cuda.forward import Forward
from gpu_service.pipeline.cuda.inputs import SweepShape
from gpu_service.pipeline.cuda.shapes import ShapeTable
from gpu_service.scheduling.costs import SweepCosts

Progress = Callable[[str, int, int], None]

_TIMED_SWEEPS = 3


class SweepGraphs:
    """Captured sweeps, by shape. All share one memory pool; only one runs at a time."""

    def __init__(self) -> None:
        self._graphs: dict[SweepShape, torch.cuda.CUDAGraph] = {}
        self._decode_ms: dict[int, float] = {}
        self._mixed_ms: dict[int, float] = {}
        self._beside_host_ms: dict[int, float] = {}
        """As `_decode_ms`, with host rows that nobody waits for."""
        self._beside_chunks: tuple[int, ...] = ()

    def capture(self, forward: Forward, table: ShapeTable, progress: Progress) -> None:
        """Inputs must store nothing and have no context: the sweeps run for real, to compile and to
        be timed."""
        shapes = list(table.captured())
        self._beside_chunks = table.beside_chunks
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for done, shape in enumerate(shapes):
                progress("CUDA graphs", done, len(shapes))
                # Kernels are compiled and loaded by a run of their own: a capture may not wait.
                forward.run(shape, shape.prefill)
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                # Not `torch.cuda.graph`: it collects garbage each time, 0.1 s.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    forward.run(shape, shape.prefill)
                finally:
                    graph.capture_end()
                self._graphs[shape] = graph
                self._note(shape, _time(graph.replay, stream))
            self._time_eager(forward, table, stream)
        torch.cuda.current_stream().wait_stream(stream)
        progress("CUDA graphs", len(shapes), len(shapes))

    def costs(self, context_ms: float) -> SweepCosts:
        """What was timed. `context_ms`: a first guess at a context token's cost."""
        return SweepCosts(self._decode_ms, self._mixed_ms, context_ms, self._beside_chunks)

    @property
    def deferred_ms(self) -> float | None:
        """What the exchange with the host adds to a sweep of decode rows; None without one."""
        added = [
            ms - self._decode_ms[rows]
            for rows, ms in self._beside_host_ms.items()
            if rows in self._decode_ms
        ]
        return max(0.0, statistics.median(added)) if added else None

    def _note(self, shape: SweepShape, milliseconds: float) -> None:
        if shape.host or shape.second:
            if not shape.prefill:
                self._beside_host_ms[shape.rows] = milliseconds
            return
        if not shape.prefill:
            self._decode_ms[shape.rows] = milliseconds
        else:
            # The same number of rows, however many of them decode.
            known = self._mixed_ms.get(shape.rows, milliseconds)
            self._mixed_ms[shape.rows] = min(known, milliseconds)

    def _time_eager(self, forward: Forward, table: ShapeTable, stream: torch.cuda.Stream) -> None:
        """Sweeps too large to capture: compile all variants, with short chunks and long ones."""
        for rows in table.eager:
            for chunks in (*table.more_chunks, table.chunks):
                shape = SweepShape(0, rows, chunks)
                forward.run(shape, 1)
                self._note(shape, _time(partial(forward.run, shape, rows), stream))

    def replay(self, shape: SweepShape) -> bool:
        """False if there is no graph of that shape."""
        graph = self._graphs.get(shape)
        if graph is None:
            return False
        graph.replay()
        return True


def _time(sweep: Callable[[], None], stream: torch.cuda.Stream) -> float:
    """Milliseconds."""
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    sweep()
    begin.record(stream)
    for _ in range(_TIMED_SWEEPS):
        sweep()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / _TIMED_SWEEPS
