"""Sweeps as CUDA graphs: one launch instead of some 300."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_service.pipeline.cuda.forward import Forward
from gpu_service.pipeline.cuda.inputs import SweepShape
from gpu_service.pipeline.cuda.shapes import ShapeTable

Progress = Callable[[str, int, int], None]

_TIMED_REPLAYS = 3


class SweepGraphs:
    """Captured sweeps, by shape. All share one memory pool; only one runs at a time."""

    def __init__(self) -> None:
        self._graphs: dict[SweepShape, torch.cuda.CUDAGraph] = {}
        self.milliseconds: dict[SweepShape, float] = {}
        """What each took without a token of context: the dense layers and all launches."""

    def capture(self, forward: Forward, table: ShapeTable, progress: Progress) -> None:
        """Inputs must be padding alone: the sweeps run for real, to compile and to be timed."""
        shapes = list(table.captured())
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
                self.milliseconds[shape] = _time(graph, stream)
        torch.cuda.current_stream().wait_stream(stream)
        progress("CUDA graphs", len(shapes), len(shapes))

    def replay(self, shape: SweepShape) -> bool:
        """False if there is no graph of that shape."""
        graph = self._graphs.get(shape)
        if graph is None:
            return False
        graph.replay()
        return True


def _time(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> float:
    """Milliseconds a replay."""
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    graph.replay()
    begin.record(stream)
    for _ in range(_TIMED_REPLAYS):
        graph.replay()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / _TIMED_REPLAYS
