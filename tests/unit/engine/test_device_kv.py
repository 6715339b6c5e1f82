"""Pools of the GPU tier and attention of prompt chunks, against fp64 written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gpu_service.pipeline.cpu_kv import CpuDeviceKv
from gpu_service.pipeline.cuda.kv import TritonDeviceKv
from gpu_service.pipeline.device_kv import AttentionGeometry, DecodeTables, DeviceKv
from gpu_service.pipeline.prefill import ChunkMasks, prefill_attention
from kernels.cpu import ThreadPool

BLOCKS, SIZE = 24, 16


def geometry(window: int = 0, heads: tuple[int, int] = (6, 2)) -> AttentionGeometry:
    return AttentionGeometry(
        layers=2,
        query_heads=heads[0],
        kv_heads=heads[1],
        head_dim=32,
        block_tokens=SIZE,
        scale=0.31,
        windows=(window, 0),
    )


def cpu(shape: AttentionGeometry, dtype: torch.dtype) -> DeviceKv:
    return CpuDeviceKv(shape, dtype, BLOCKS, ThreadPool(1))


def triton(shape: AttentionGeometry, dtype: torch.dtype) -> DeviceKv:
    return TritonDeviceKv(shape, dtype, BLOCKS, torch.device("cpu"), max_rows=8)


KINDS: dict[str, Callable[[AttentionGeometry, torch.dtype], DeviceKv]] = {
    "cpu": cpu,
    "triton": triton,
}


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """fp64 causal attention of the last `len(q)` positions: q [T, H, D], k and v [C, G, D]."""
    tokens, context = q.shape[0], k.shape[0]
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    distance = torch.arange(context - tokens, context)[:, None] - torch.arange(context)
    seen = (distance >= 0) & ((distance < window) if window else True)
    scores = torch.einsum("thd,chd->htc", q.double(), k) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("htc,chd->thd", weights, v)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back(kind: str, dtype: torch.dtype) -> None:
    pool = KINDS[kind](geometry(), dtype)
    slots = torch.randperm(BLOCKS * SIZE)[:50]
    for layer in range(2):
        k, v = normal(50, 2, 32, dtype=dtype, seed=layer), normal(50, 2, 32, dtype=dtype, seed=9)
        pool.write(layer, slots, k, v)
        back = pool.read(layer, slots.flip(0))
        assert torch.equal(back[0], k.flip(0))
        assert torch.equal(back[1], v.flip(0))


def decode(pool: DeviceKv, shape: AttentionGeometry, lengths: list[int]) -> tuple[float, float]:
    """Largest errors of `decode` and of fp32 SDPA on the same KV, against fp64."""
    tables = np.random.default_rng(1).permutation(BLOCKS).astype(np.int32)
    tables = tables[: len(lengths) * 6].reshape(len(lengths), 6)
    q = normal(len(lengths), shape.query_heads, 32, seed=3)
    new_k, new_v = normal(len(lengths), 2, 32, seed=4), normal(len(lengths), 2, 32, seed=5)
    expected, reference = torch.empty_like(q, dtype=torch.float64), torch.empty_like(q)
    for row, length in enumerate(lengths):
        k, v = normal(length, 2, 32, seed=row + 10), normal(length, 2, 32, seed=row + 50)
        k[-1], v[-1] = new_k[row], new_v[row]
        places = torch.arange(length - 1)
        slots = torch.from_numpy(tables[row]).long()[places // SIZE] * SIZE + places % SIZE
        pool.write(0, slots, k[:-1], v[:-1])
        expected[row] = oracle(q[row : row + 1], k, v, shape.scale, shape.windows[0])[0]
        mask = ChunkMasks(length - 1, 1, q.device)
        seen = mask.context(shape.windows[0]) + 1
        reference[row] = prefill_attention(
            shape, q[row : row + 1], k[-seen:], v[-seen:], mask.mask(shape.windows[0])
        )[0]
    out = torch.full_like(q, float("nan"))
    pool.begin_sweep(DecodeTables(np.array(lengths, np.int32), tables))
    pool.decode(0, q, new_k, new_v, out)
    return float((out - expected).abs().max()), float((reference - expected).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize("lengths", [[1], [16, 17, 95, 2], [15, 96, 33]])
def test_decode_attention(kind: str, window: int, lengths: list[int]) -> None:
    shape = geometry(window)
    ours, theirs = decode(KINDS[kind](shape, torch.float32), shape, lengths)
    assert ours <= max(2 * theirs, 1e-6)


@pytest.mark.parametrize(
    "mutant",
    [
        {"scale": 0.3},
        {"windows": (6, 0)},
        {"windows": (0, 0)},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_mutants_fail(kind: str, mutant: dict[str, object]) -> None:
    right = geometry(5)
    wrong = AttentionGeometry(**{**vars(right), **mutant})  # type: ignore[arg-type]
    ours, theirs = decode(KINDS[kind](wrong, torch.float32), right, [16, 17, 95, 2])
    assert not ours <= max(2 * theirs, 1e-6)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("window", [0, 1, 7, 16, 100])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 20), (3, 1), (9, 14), (40, 5)])
def test_chunk_attention(start: int, tokens: int, window: int, heads: tuple[int, int]) -> None:
    shape = geometry(window, heads)
    masks = ChunkMasks(start, tokens, torch.device("cpu"))
    context = masks.context(window)
    length = start + tokens
    q = normal(tokens, heads[0], 32, seed=1)
    k, v = normal(length, heads[1], 32, seed=2), normal(length, heads[1], 32, seed=3)
    expected = oracle(q, k, v, shape.scale, window)
    k, v = k[start - context :], v[start - context :]
    out = prefill_attention(shape, q, k, v, masks.mask(window))
    assert (out - expected).abs().max() < 2e-6
    if window > 1 and length > window:
        mutant = masks.mask(window)
        assert mutant is not None
        mutant[-1, int(mutant[-1].int().argmax())] = False
        wrong = prefill_attention(shape, q, k, v, mutant)
        assert (wrong - expected).abs().max() > 1e-4, "one key too few must show"
