"""GPU kernels against their floor (bytes / measured bandwidth) and against torch.

    python -m benchmarks.kernels.gpu [--json FILE] [--sweep] [--small]

Median of device events over rotating buffers larger than the L2 cache, replayed from a CUDA graph
so that launches do not count. `--sweep` tries decode attention's tile, warps, stages and splits;
`--small` leaves attention out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as functional

from kernels.gpu.decode_attention import DecodeAttention, choose_splits
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.rope_store import rope_store
from kernels.gpu.silu_mul import silu_mul

BF16 = torch.bfloat16
ROUNDS = 30


def median_us(calls: list[Callable[[], None]]) -> float:
    """Microseconds of one call; the calls rotate over buffers, all within one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be filling the buffers
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second of a large device copy, read and written bytes counted."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_us([lambda: target.copy_(source)]) / 1e6)


class DecodeBench:
    """One batch of equal contexts over permuted tables, on several layers in turn."""

    def __init__(self, rows: int, context: int, query_heads: int, kv_heads: int, dim: int) -> None:
        per_row = math.ceil(context / 16)
        self.bytes = rows * context * kv_heads * dim * 2 * 2
        self.layers = max(2, min(32, math.ceil((1 << 30) / self.bytes)))
        self.layout = GpuKvLayout(self.layers, rows * per_row, kv_heads, 16, dim)
        self.cache = torch.randn(self.layout.shape, device="cuda", dtype=BF16)
        order = torch.randperm(rows * per_row, device="cuda").int()
        self.tables = order.reshape(rows, per_row).contiguous()
        self.lengths = torch.full((rows,), context, dtype=torch.int32, device="cuda")
        self.q = torch.randn(rows, query_heads, dim, device="cuda", dtype=BF16)
        self.out = torch.empty_like(self.q)

    def run(self, **tuning: int) -> float:
        rows, heads, dim = self.q.shape
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        splits = tuning.pop("splits", 0) or choose_splits(rows, self.layout.kv_heads, processors)
        attention = DecodeAttention(self.layout, heads, rows, splits, "cuda")
        for name, value in tuning.items():
            setattr(attention, name, value)

        def call(layer: int) -> Callable[[], None]:
            return lambda: attention(
                self.q, self.cache[layer], self.tables, self.lengths, self.out, scale=dim**-0.5
            )

        return median_us([call(layer) for layer in range(self.layers)])

    def torch_us(self) -> float:
        """SDPA over K and V that lie contiguous already: no paging to pay for."""
        rows, _, dim = self.q.shape
        shape = (2, rows, self.layout.kv_heads, int(self.lengths[0]), dim)
        copies = [torch.randn(shape, device="cuda", dtype=BF16) for _ in range(min(self.layers, 4))]
        q = self.q[:, :, None]
        return median_us(
            [
                lambda kv=kv: functional.scaled_dot_product_attention(
                    q, kv[0], kv[1], enable_gqa=True
                )
                for kv in copies
            ]
        )


def small_kernels(rows: int) -> Iterator[tuple[str, float, float, float]]:
    """(name, bytes, our microseconds, torch's) at Llama-3-8B's widths."""
    width, inner, heads, kv_heads, dim = 4096, 14336, 32, 8, 128
    sets = 4

    def make(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape, device="cuda", dtype=BF16) for _ in range(sets)]

    x, residual, weight = make(rows, width), make(rows, width), make(width)
    out = torch.empty_like(x[0])
    ours = median_us(
        [lambda i=i: add_rms_norm(x[i], residual[i], weight[0], out, eps=1e-5) for i in range(sets)]
    )
    theirs = median_us(
        [
            lambda i=i: torch.rms_norm(residual[i].add_(x[i]), (width,), weight[0], 1e-5)
            for i in range(sets)
        ]
    )
    yield "add + rms_norm", 4 * rows * width * 2, ours, theirs

    gate_up, active = make(rows, 2 * inner), torch.empty(rows, inner, device="cuda", dtype=BF16)
    ours = median_us([lambda g=g: silu_mul(g, active) for g in gate_up])
    theirs = median_us(
        [lambda g=g: functional.silu(g[:, :inner]).mul_(g[:, inner:]) for g in gate_up]
    )
    yield "silu * up", 3 * rows * inner * 2, ours, theirs

    layout = GpuKvLayout(1, math.ceil(rows / 16), kv_heads, 16, dim)
    cache = layout.allocate(BF16, "cuda")[0]
    qkv, q = make(rows, heads + 2 * kv_heads, dim), make(rows, heads, dim)
    cos_sin = torch.randn(8192, 2, dim // 2, device="cuda", dtype=BF16)
    positions = torch.arange(rows, device="cuda")
    norms = torch.randn(2, dim, device="cuda", dtype=BF16)
    ours, normed = (
        median_us(
            [
                lambda i=i, norm=norm: rope_store(
                    qkv[i], cos_sin, positions, positions, q[i], cache, layout, qk_norm=norm
                )
                for i in range(sets)
            ]
        )
        for norm in (None, norms)
    )

    def plain(i: int) -> None:
        table = cos_sin[positions]
        rotated = qkv[i][:, : heads + kv_heads]
        low, high = rotated.chunk(2, -1)
        cos, sin = table[:, :1], table[:, 1:]
        done = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
        flat = cache.transpose(1, 3).reshape(-1)
        flat[: done[:, heads:].numel()] = done[:, heads:].reshape(-1)

    theirs = median_us([lambda i=i: plain(i) for i in range(sets)])
    moved = 2 * rows * (heads + 2 * kv_heads) * dim * 2
    yield "rope + KV store", moved, ours, theirs
    yield "rope with Q/K norm", moved, normed, math.nan


DECODES = {
    "Llama-3-8B, 24 x 1,100": (24, 1100, 32, 8, 128),
    "Llama-3-8B, 100 x 1,100": (100, 1100, 32, 8, 128),
    "Llama-3-8B, 256 x 1,100": (256, 1100, 32, 8, 128),
    "Llama-3-8B, 1 x 32,768": (1, 32768, 32, 8, 128),
    "Llama-2-7B, 24 x 1,100": (24, 1100, 32, 32, 128),
    "Llama-3-70B, 24 x 1,100": (24, 1100, 64, 8, 128),
}


def sweep(json_lines: list[dict[str, object]]) -> None:
    for name in ("Llama-3-8B, 24 x 1,100", "Llama-3-8B, 100 x 1,100"):
        bench = DecodeBench(*DECODES[name])
        tried = []
        for tile, warps, stages, splits in itertools.product(
            (32, 64, 128), (2, 4), (2, 3, 4, 5), (0, 1, 2, 6)
        ):
            if tile * stages > 320:
                continue
            us = bench.run(tile=tile, warps=warps, stages=stages, splits=splits)
            tried.append((us, {"tile": tile, "warps": warps, "stages": stages, "splits": splits}))
        tried.sort(key=lambda item: item[0])
        for us, tuning in tried[:6]:
            print(
                f"{name:28s} {us:8.1f} us {bench.bytes / us / 1e6:5.2f} TB/s  {tuning}", flush=True
            )
            json_lines.append({"case": name, "us": us, **tuning})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    lines: list[dict[str, object]] = []
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    for name, shape in () if args.small else DECODES.items():
        bench = DecodeBench(*shape)
        ours, theirs = bench.run(), bench.torch_us()
        share = bench.bytes / (ours / 1e6) / bandwidth
        print(
            f"decode {name:26s} {ours:8.1f} us  {share:4.0%} of copy  torch {theirs:8.1f} us",
            flush=True,
        )
        lines.append({"case": name, "us": ours, "share": share, "torch_us": theirs})
        del bench
        torch.cuda.empty_cache()
    for rows in (64, 4096):
        for name, size, ours, theirs in small_kernels(rows):
            share = size / (ours / 1e6) / bandwidth
            ours_text = f"{name:18s} {rows:5d} rows {ours:8.1f} us  {share:4.0%} of copy"
            print(f"{ours_text}  torch {theirs:8.1f} us", flush=True)
            lines.append(
                {"case": name, "rows": rows, "us": ours, "share": share, "torch_us": theirs}
            )
    if args.sweep:
        sweep(lines)
    if args.json:
        args.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
