"""Which way dense layers are computed, by their number of rows: torch's, or an algorithm of
cuBLASLt that was measured to be faster.

docs/perf-log.md, "Dense layers": on an H100 most is saved where inputs are many (down projection,
up to 15%) and by the head (6%). Above 256 rows the card's power limit leaves nothing of it. A
stream-K kernel in Triton was slower for every shape.

Each algorithm always gives the same bits, but near ties may be decided otherwise at the next start.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from kernels.gpu.linear_lt import CublasLt, LtProduct

_GAIN = 0.985
"""What is not clearly faster than torch's way is noise: torch's is the same at each start."""
_COLD_BYTES = 128 << 20
"""Weights read before one comes again: more than any L2 cache holds."""
_FINALISTS = 3

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], None]


def torch_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """`out = x @ weight.T + bias`."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


class LinearPlan:
    """`out = x @ weight.T + bias` of one shape. Launches on the current stream, in CUDA graphs too;
    all plans of one library share its workspace, so no two may run at a time."""

    def __init__(self, ways: dict[int, Way]) -> None:
        """`ways` by number of rows; others go torch's way."""
        self._ways = ways

    @property
    def rows(self) -> tuple[int, ...]:
        """The numbers of rows that do not go torch's way."""
        return tuple(self._ways)

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        self._ways.get(x.shape[0], torch_linear)(x, weight, bias, out)


def plan_linear(
    library: CublasLt,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    rows: Iterable[int],
) -> LinearPlan:
    """Measure every algorithm for each of `rows`, some 50 ms each on an H100.

    weights: `[outputs, inputs]` of several layers of one shape, so that they do not come from the
    cache; all have a bias or none. Waits for the device; not during a capture.
    """
    ways = {}
    for count in sorted(set(rows)):
        way = _fastest(library, _cold(weights), bias, count)
        if way is not None:
            ways[count] = way
    return LinearPlan(ways)


def _cold(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    calls = -(-_COLD_BYTES // weights[0].nbytes)
    return [weights[index % len(weights)] for index in range(min(max(calls, 4), 32))]


def _fastest(
    library: CublasLt, weights: Sequence[torch.Tensor], bias: torch.Tensor | None, rows: int
) -> Way | None:
    """None if torch's way is as fast."""
    first = weights[0]
    x = torch.randn(rows, first.shape[1], device=first.device).to(first.dtype)
    out = torch.empty(rows, first.shape[0], dtype=first.dtype, device=first.device)
    product = LtProduct(library, rows, first, bias)

    def measure(way: Way, rounds: int) -> float:
        calls = [partial(way, x, weight, bias, out) for weight in weights]
        return graph_us(calls, rounds, library.stream)

    ways = [partial(product.run, algorithm) for algorithm in product.algorithms()]
    ranked = sorted(ways, key=lambda way: measure(way, 3))
    finalists = [(measure(way, 9), way) for way in ranked[:_FINALISTS]]
    if not finalists:
        return None
    best, way = min(finalists, key=lambda final: final[0])
    return way if best < _GAIN * measure(torch_linear, 9) else None


def graph_us(calls: Sequence[Callable[[], None]], rounds: int, stream: torch.cuda.Stream) -> float:
    """Median microseconds of a call, all of them captured in one graph: what a sweep costs."""
    stream.wait_stream(torch.cuda.current_stream())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
        for _ in range(rounds + 1):
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:])
