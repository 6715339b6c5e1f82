"""The sampler and the blocks on their way to the host, against bytes and torch.

    python -m benchmarks.kernels.gpu_sampling [--json FILE] [--sweep]

Sampling: logits `[rows, 128,256]` in bf16, normal with a standard deviation of 3. Floor: the logits
read once. Blocks: a request of 1,000 tokens of Llama-3-8B; floor: read once, written once.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.kernels.gpu import BF16, copy_bandwidth, median_us
from kernels.gpu.host_pieces import HostPieces
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.sampling import Sampler
from kernels.gpu.sampling_inputs import History, RowWish, SamplingInputs

VOCABULARY = 128_256
WISHES = {
    "temperature": {"temperature": 0.8},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top-k 50, top-p 0.95": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "greedy, penalised": {"repetition": 1.1, "frequency": 0.1},
}
Line = tuple[str, float, float, float]
"""name, bytes, our microseconds, torch's"""


def torch_top_p(logits: torch.Tensor, share: float) -> torch.Tensor:
    """As it is often written: a sort of everything."""
    values, ids = (logits.float() / 0.8).softmax(-1).sort(descending=True)
    values[values.cumsum(-1) - values > share] = 0
    return ids.gather(1, torch.multinomial(values, 1))


def torch_logprobs(logits: torch.Tensor, top: int) -> None:
    logits.float().log_softmax(-1).topk(top)


def sampling(rows: int) -> Iterator[Line]:
    logits = [torch.randn(rows, VOCABULARY, device="cuda", dtype=BF16) * 3 for _ in range(4)]
    size = rows * VOCABULARY * 2
    out = torch.empty(rows, dtype=torch.int64, device="cuda")
    sampler = Sampler(rows, VOCABULARY, "cuda")
    ours = median_us([lambda x=x: sampler.greedy(x, out) for x in logits])
    theirs = median_us([lambda x=x: torch.max(x, dim=1) for x in logits])
    yield f"greedy, {rows} rows", size, ours, theirs
    inputs, history = SamplingInputs(rows, 64, "cuda"), History(rows, VOCABULARY, "cuda")
    sort_us = median_us([lambda x=x: torch_top_p(x, 0.9) for x in logits])
    for name, wish in WISHES.items():
        penalised = "repetition" in wish
        inputs.send(
            [RowWish(seed=row, history=row if penalised else -1, **wish) for row in range(rows)]
        )
        torch.cuda.synchronize()
        ours = median_us([lambda x=x: sampler.sample(x, inputs, out, history) for x in logits])
        yield f"{name}, {rows} rows", size, ours, sort_us
    for top in (0, 5, 20):
        inputs.send([RowWish(logprobs=top)] * rows)
        ours = median_us([lambda x=x: sampler.logprobs(x, out, inputs.tops) for x in logits])
        theirs = median_us([partial(torch_logprobs, x, max(1, top)) for x in logits])
        yield f"logprobs {top}, {rows} rows", size, ours, theirs


def chunks(rows: int) -> Iterator[Line]:
    """How many gathered tokens a program looks at in one go."""
    logits = [torch.randn(rows, VOCABULARY, device="cuda", dtype=BF16) * 3 for _ in range(4)]
    inputs = SamplingInputs(rows, 1, "cuda")
    inputs.send([RowWish(seed=row, **WISHES["top-p 0.9"]) for row in range(rows)])
    out = torch.empty(rows, dtype=torch.int64, device="cuda")
    for chunk in (512, 1024, 2048, 4096):
        sampler = Sampler(rows, VOCABULARY, "cuda", chunk=chunk)
        us = median_us([partial(sampler.sample, x, inputs, out) for x in logits])
        yield f"top-p 0.9, {rows} rows, chunk {chunk}", rows * VOCABULARY * 2, us, math.nan


def blocks() -> Iterator[Line]:
    layout, count = GpuKvLayout(32, 200, 8, 16, 128), 63
    cache = torch.randn(layout.shape, device="cuda").to(BF16)
    sources = torch.randperm(200, device="cuda").int()[:count].contiguous()
    targets = torch.arange(count, dtype=torch.int32, device="cuda")
    for dtype in (BF16, torch.int8):
        pieces = HostPieces(layout, dtype)
        shape = (32, count, pieces.piece_bytes)
        staging = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        pinned = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        plain = median_us([lambda s=staging, p=pinned: p.copy_(s, non_blocking=True)])
        moved = staging.numel() + 32 * count * layout.piece_elements * 2
        name = str(dtype).removeprefix("torch.")
        kinds = (("staging on the device", staging, moved), ("pinned", pinned, staging.numel()))
        for kind, host, size in kinds:
            us = median_us([lambda p=pieces, h=host: p.write(cache, sources, h, targets)])
            yield f"demote to {name}, {kind}", size, us, plain
            us = median_us([lambda p=pieces, h=host: p.read(h, targets, cache, sources)])
            yield f"promote from {name}, {kind}", size, us, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    lines: list[dict[str, object]] = []
    sources = [sampling(24), sampling(256), blocks()]
    if args.sweep:
        sources += [chunks(24), chunks(256)]
    for source in sources:
        for name, size, ours, theirs in source:
            rate = size / ours / 1e3
            print(f"{name:44s} {ours:8.1f} us {rate:7.0f} GB/s  torch {theirs:8.1f}", flush=True)
            lines.append({"case": name, "us": ours, "gb_per_s": rate, "torch_us": theirs})
    if args.json:
        args.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
