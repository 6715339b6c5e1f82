"""Prefill attention against the arithmetic's floor and against torch's fused attention.

    python -m benchmarks.kernels.gpu_prefill [--json FILE] [--sweep]

Heads of Llama-3-8B in bf16, blocks of 16 in permuted tables. torch gets contiguous K and V; where a
case has cached tokens before the chunk it attends from the chunk's rows, masked at the lower right.
`--sweep` tries tilings for some.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.kernels.gpu import BF16, median_us
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.prefill_attention import PrefillAttention, Tiling

PEAK = 990e12
"""Dense bf16 operations per second that the card's data sheet says."""
QUERY_HEADS, KV_HEADS, DIM = 32, 8, 128
# name -> (cached tokens, own tokens) of each chunk
CASES: dict[str, tuple[tuple[int, int], ...]] = {
    "1 x 8,192": ((0, 8192),),
    "1 x 2,048": ((0, 2048),),
    "8 x 1,000": ((0, 1000),) * 8,
    "512 after 7,680": ((7680, 512),),
    "232 after 768": ((768, 232),),
    "3 x 77 after 500": ((500, 77),) * 3,
}
SWEPT = ("1 x 8,192", "8 x 1,000", "232 after 768")
TILINGS = (
    Tiling(32, 64, 2, 3),
    Tiling(32, 64, 4, 3),
    Tiling(64, 32, 4, 4),
    Tiling(64, 64, 4, 2),
    Tiling(64, 64, 4, 3),
    Tiling(64, 64, 4, 4),
    Tiling(64, 128, 4, 2),
    Tiling(128, 64, 8, 2),
    Tiling(128, 64, 8, 3),
    Tiling(128, 64, 8, 4),
    Tiling(128, 128, 8, 2),
)


class PrefillBench:
    """One sweep's chunks, on a few layers in turn."""

    LAYERS = 4

    def __init__(self, chunks: tuple[tuple[int, int], ...]) -> None:
        self.chunks = chunks
        per_row = math.ceil(max(sum(chunk) for chunk in chunks) / 16)
        self.layout = GpuKvLayout(self.LAYERS, len(chunks) * per_row, KV_HEADS, 16, DIM)
        self.cache = torch.randn(self.layout.shape, device="cuda", dtype=BF16)
        order = torch.randperm(len(chunks) * per_row, device="cuda").int()
        self.tables = order.reshape(len(chunks), per_row).contiguous()
        numbers = {"dtype": torch.int32, "device": "cuda"}
        self.lengths = torch.tensor([sum(chunk) for chunk in chunks], **numbers)
        ends = torch.tensor([0, *(own for _, own in chunks)]).cumsum(0)
        self.first_rows = ends.to(**numbers)
        self.q = torch.randn(int(ends[-1]), QUERY_HEADS, DIM, device="cuda", dtype=BF16)
        self.out = torch.empty_like(self.q)
        pairs = sum(own * cached + own * (own + 1) // 2 for cached, own in chunks)
        self.operations = 4 * DIM * QUERY_HEADS * pairs

    def run(self, tiling: Tiling | None = None) -> float:
        attention = PrefillAttention(
            self.layout,
            QUERY_HEADS,
            "cuda",
            torch.cuda.get_device_properties(0).multi_processor_count,
        )
        attention.tiling = tiling
        longest = max(own for _, own in self.chunks)

        def call(layer: int) -> Callable[[], None]:
            return lambda: attention(
                self.q, self.cache[layer], self.tables, self.lengths, self.first_rows, self.out,
                longest=longest, scale=DIM**-0.5,
            )  # fmt: skip

        return median_us([call(layer) for layer in range(self.LAYERS)])

    def torch_us(self, backend: SDPBackend) -> float:
        """NaN where the backend does not take the case, or chunks differ."""
        cached, own = self.chunks[0]
        count = len(self.chunks)
        q = torch.randn(count, QUERY_HEADS, own, DIM, device="cuda", dtype=BF16)
        shape = (2, count, KV_HEADS, cached + own, DIM)
        k, v = torch.randn(shape, device="cuda", dtype=BF16)
        options = {"attn_mask": causal_lower_right(own, cached + own)} if cached else {}
        try:
            with sdpa_kernel(backend):
                return median_us(
                    [
                        lambda: functional.scaled_dot_product_attention(
                            q, k, v, is_causal=not cached, enable_gqa=True, **options
                        )
                    ]
                    * self.LAYERS
                )
        except RuntimeError:
            return math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    lines: list[dict[str, object]] = []
    for name, chunks in CASES.items():
        bench = PrefillBench(chunks)
        ours = bench.run()
        theirs = {
            backend.name.split("_")[0].lower(): bench.torch_us(backend)
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        }
        rate = bench.operations / ours / 1e6
        others = "  ".join(f"{key} {us:8.1f}" for key, us in theirs.items())
        print(
            f"prefill {name:18s} {ours:8.1f} us {rate:6.1f} TFLOP/s {rate * 1e12 / PEAK:4.0%}"
            f"  torch: {others}",
            flush=True,
        )
        lines.append({"case": name, "us": ours, "tflops": rate, **theirs})
        if args.sweep and name in SWEPT:
            tried = sorted((bench.run(tiling), str(tiling)) for tiling in TILINGS)
            for us, tiling in tried[:6]:
                print(f"    {us:8.1f} us  {tiling}", flush=True)
            lines += [{"case": name, "us": us, "tiling": tiling} for us, tiling in tried]
    if args.json:
        args.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
