"""Dense layers of Llama-3-8B: torch's way beside the planned one, against their floor.

    python -m benchmarks.kernels.gpu_linear [--json FILE] [--rows 24,256] [--sustained SECONDS]

Normal operands in bf16, weights that rotate past the L2 cache, median of device events, in a CUDA
graph. Floor: the larger of weight bytes at 3.0 TB/s and operations at 800 TFLOP/s. `--sustained`
runs a layer's four products over and over, until the card's power limit has lowered its clock.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from kernels.gpu.linear_lt import CublasLt
from kernels.gpu.linear_plan import LinearPlan, Way, graph_us, plan_linear, torch_linear

SHAPES = {
    "qkv": (6144, 4096),
    "output": (4096, 4096),
    "gate-up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
"""Outputs, inputs."""
LAYER = ("qkv", "output", "gate-up", "down")
ROWS = (1, 8, 16, 24, 32, 64, 128, 160, 192, 224, 256, 384, 512)
BANDWIDTH, RATE = 3.0e12, 800e12


def floor_us(rows: int, outputs: int, inputs: int) -> float:
    """Microseconds that reading the weights or computing takes at least."""
    size = outputs * inputs
    return max(2 * size / BANDWIDTH, 2 * rows * size / RATE) * 1e6


class DenseBench:
    """Weights of several layers, a plan for each shape, and buffers for one number of rows."""

    def __init__(self, rows: tuple[int, ...], layers: int = 8) -> None:
        self.weights = {
            name: [
                0.02 * torch.randn(shape, device="cuda", dtype=torch.bfloat16)
                for _ in range(1 if name == "lm_head" else layers)
            ]
            for name, shape in SHAPES.items()
        }
        library = CublasLt(torch.device("cuda"))
        self.stream = library.stream
        self.plans: dict[str, LinearPlan] = {}
        self.planning_ms: dict[str, float] = {}
        for name, weights in self.weights.items():
            begin = time.perf_counter()
            self.plans[name] = plan_linear(library, weights, None, rows)
            self.planning_ms[name] = (time.perf_counter() - begin) * 1e3

    def calls(self, name: str, rows: int, way: Way) -> list[Callable[[], None]]:
        """One for each layer."""
        outputs, inputs = SHAPES[name]
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(rows, outputs, device="cuda", dtype=torch.bfloat16)
        return [partial(way, x, weight, None, out) for weight in self.weights[name]]

    def layers(self, rows: int, planned: bool) -> list[Callable[[], None]]:
        """The four products of each layer, layer by layer."""
        each = [
            self.calls(name, rows, self.plans[name] if planned else torch_linear) for name in LAYER
        ]
        return [call for layer in zip(*each, strict=True) for call in layer]

    def us(self, calls: list[Callable[[], None]], rounds: int = 15) -> float:
        """Microseconds of a call."""
        return graph_us(calls, rounds, self.stream)

    def sustained_us(self, rows: int, planned: bool, seconds: float) -> float:
        """Microseconds of a layer, once layers have run for a while."""
        calls = self.layers(rows, planned)
        rounds = max(4, int(seconds * 1e6 / (self.us(calls) * len(calls))))
        self.us(calls, rounds)
        return len(LAYER) * self.us(calls, rounds // 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--sustained", type=float, default=0.0, metavar="SECONDS")
    args = parser.parse_args()
    rows = tuple(int(count) for count in args.rows.split(","))
    torch.manual_seed(0)
    bench = DenseBench(rows)
    lines: list[dict[str, object]] = []
    for count in rows:
        for name, shape in SHAPES.items():
            floor = floor_us(count, *shape)
            theirs = bench.us(bench.calls(name, count, torch_linear))
            ours = bench.us(bench.calls(name, count, bench.plans[name]))
            operations, size = 2 * count * shape[0] * shape[1], 2 * shape[0] * shape[1]
            print(
                f"{count:4d} rows {name:8s} {ours:7.1f} us {size / ours / 1e6:5.2f} TB/s "
                f"{operations / ours / 1e6:5.0f} TFLOP/s {floor / ours:4.0%} of floor  "
                f"torch {theirs:7.1f} us",
                flush=True,
            )
            lines.append({"rows": count, "case": name, "us": ours, "torch_us": theirs})
        if args.sustained:
            theirs, ours = (
                bench.sustained_us(count, planned, args.sustained) for planned in (False, True)
            )
            print(f"{count:4d} rows, a layer for long: {ours:.1f} us  torch {theirs:.1f} us")
            lines.append({"rows": count, "case": "sustained", "us": ours, "torch_us": theirs})
    taken = ", ".join(f"{name} {ms:.0f}" for name, ms in bench.planning_ms.items())
    print(f"planning took, ms: {taken}")
    if args.json:
        args.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
