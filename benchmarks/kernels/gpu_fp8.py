"""fp8 dense layers on a GPU against their floor, at Llama-3-70B's shapes.

    python -m benchmarks.kernels.gpu_fp8 [--json FILE] [--rows 24,120,256]

Kernels that quantise: bytes over 3.0 TB/s. Products (`torch._scaled_mm`, scales by row and
channel): the larger of the weight's bytes over 3.0 TB/s and operations over 1,500 TFLOP/s. Median
of device events over rotating buffers larger than the L2 cache, replayed from a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.kernels.gpu import median_us
from gpu_service.model.fp8 import Fp8Linear, Fp8Rows, random_weight
from kernels.gpu.fp8_quantize import add_rms_norm_quantise, quantise_rows, silu_mul_quantise
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.silu_mul import silu_mul

BYTES_PER_SECOND = 3.0e12
OPERATIONS_PER_SECOND = 1.5e15
COLD_BYTES = 256 << 20
CUDA = torch.device("cuda")
HIDDEN, INNER = 8192, 28672
PRODUCTS = {
    "QKV": (10240, HIDDEN),
    "output": (HIDDEN, HIDDEN),
    "gate-up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
"""Outputs, inputs."""


def copies(one_bytes: int) -> int:
    return max(2, -(-COLD_BYTES // one_bytes))


def product_us(rows: int, outputs: int, inputs: int) -> float:
    x = Fp8Rows.empty(rows, inputs, CUDA)
    random_weight(x, 1, 1.0)
    linears = []
    for number in range(copies(outputs * inputs)):
        weight = Fp8Rows.empty(outputs, inputs, CUDA)
        random_weight(weight, number, 0.02)
        linears.append(Fp8Linear(weight, torch.bfloat16))
    out = torch.empty(rows, outputs, dtype=torch.bfloat16, device=CUDA)
    return median_us([partial(linear.into, x, out) for linear in linears])


def small_kernels(rows: int) -> Iterator[tuple[str, int, float, float]]:
    """Name, bytes, microseconds fused, and as two kernels (nan where there is only one)."""
    weight = torch.randn(HIDDEN, device=CUDA).bfloat16()
    sets = min(copies(rows * HIDDEN * 2), 32)
    x, residual = (torch.randn(sets, rows, HIDDEN, device=CUDA).bfloat16() for _ in range(2))
    gate_up = torch.randn(sets, rows, 2 * INNER, device=CUDA).bfloat16()
    narrow, wide = Fp8Rows.empty(rows, HIDDEN, CUDA), Fp8Rows.empty(rows, INNER, CUDA)
    normed, gated = (
        torch.empty(rows, width, dtype=torch.bfloat16, device=CUDA) for width in (HIDDEN, INNER)
    )

    def quantise(i: int) -> None:
        quantise_rows(x[i], narrow.codes, narrow.scales)

    def norm(i: int) -> None:
        add_rms_norm_quantise(x[i], residual[i], weight, narrow.codes, narrow.scales, eps=1e-5)

    def norm_then_quantise(i: int) -> None:
        add_rms_norm(x[i], residual[i], weight, normed, eps=1e-5)
        quantise_rows(normed, narrow.codes, narrow.scales)

    def gate(i: int) -> None:
        silu_mul_quantise(gate_up[i], wide.codes, wide.scales)

    def gate_then_quantise(i: int) -> None:
        silu_mul(gate_up[i], gated)
        quantise_rows(gated, wide.codes, wide.scales)

    def us(kernel: Callable[[int], None]) -> float:
        return median_us([partial(kernel, i) for i in range(sets)])

    yield "quantise", rows * HIDDEN * 3, us(quantise), float("nan")
    yield "norm, quantise", rows * HIDDEN * 7, us(norm), us(norm_then_quantise)
    yield "SiLU, quantise", rows * INNER * 5, us(gate), us(gate_then_quantise)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="24,64,120,256,512")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: list[dict[str, object]] = []
    for rows in map(int, args.rows.split(",")):
        layer_us = 0.0
        for name, (outputs, inputs) in PRODUCTS.items():
            us = product_us(rows, outputs, inputs)
            memory = outputs * inputs / BYTES_PER_SECOND
            floor = 1e6 * max(memory, 2 * rows * outputs * inputs / OPERATIONS_PER_SECOND)
            layer_us += us
            print(f"{rows:5d} rows  {name:8s} {us:7.1f} us  floor {floor:6.1f}", flush=True)
            found.append({"rows": rows, "product": name, "us": us, "floor_us": floor})
        print(f"{rows:5d} rows  80 layers {80e-3 * layer_us:.2f} ms", flush=True)
    for rows in (24, 120, 4096):
        for name, size, us, apart in small_kernels(rows):
            share = size / BYTES_PER_SECOND / (us / 1e6)
            text = f"{rows:5d} rows  {name:15s} {us:7.1f} us  {share:4.0%} of 3.0 TB/s"
            print(f"{text}  as two {apart:7.1f} us", flush=True)
            found.append({"rows": rows, "kernel": name, "us": us, "share": share, "apart": apart})
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
