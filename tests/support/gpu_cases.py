"""Cases and fp64 oracles of the GPU kernels, run in the interpreter and on a device alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.gpu.decode_attention import DecodeAttention
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.rope_store import rope_store
from kernels.gpu.silu_mul import silu_mul
from kernels.gpu.tensors import INTERPRET

BOUND = 6.0 if INTERPRET else 2.0
"""Times torch's own error in the same dtype. The interpreter truncates to bf16 where a device
rounds, so there it can only find gross mistakes in bf16."""


@dataclass(frozen=True)
class DecodeCase:
    """One call of decode attention; lengths may be 0 (padding rows)."""

    query_heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    lengths: tuple[int, ...]
    splits: int = 2
    window: int = 0
    softcap: float = 0.0
    magnitude: float = 1.0
    dtype: torch.dtype = torch.float32


@dataclass
class DecodeInputs:
    case: DecodeCase
    layout: GpuKvLayout
    q: torch.Tensor
    cache: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor

    def rows(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V `[length, kv_heads, head_dim]` of each row, gathered the slow way."""
        size, gathered = self.layout.block_tokens, []
        for row, length in enumerate(self.case.lengths):
            k, v = (
                torch.stack(
                    [
                        self.cache[0, self.tables[row, t // size], half, :, t % size]
                        for t in range(length)
                    ]
                )
                if length
                else torch.empty(0)
                for half in (0, 1)
            )
            gathered.append((k, v))
        return gathered


def decode_inputs(case: DecodeCase, device: str, seed: int = 0) -> DecodeInputs:
    """Random inputs; every slot that no row owns is NaN, so that reading one shows."""
    draw = torch.Generator().manual_seed(seed)
    size = case.block_tokens
    needed = [-(-length // size) for length in case.lengths]
    blocks = sum(needed) + 3
    layout = GpuKvLayout(1, blocks, case.kv_heads, size, case.head_dim)
    cache = torch.full(layout.shape, float("nan"))
    order = torch.randperm(blocks, generator=draw).tolist()
    tables = torch.full((len(needed), max(max(needed), 1) + 1), 2**30, dtype=torch.int32)
    for row, count in enumerate(needed):
        mine = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(mine, dtype=torch.int32)
        for t in range(case.lengths[row]):
            shape = (2, case.kv_heads, case.head_dim)
            cache[0, mine[t // size], :, :, t % size] = torch.randn(shape, generator=draw)
    q = torch.randn((len(needed), case.query_heads, case.head_dim), generator=draw) * case.magnitude
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    moved = [x.to(device) for x in (q.to(case.dtype), cache.to(case.dtype), tables, lengths)]
    return DecodeInputs(case, layout, *moved)


def decode_oracle(inputs: DecodeInputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in `dtype` arithmetic: fp64 is the truth, the model's dtype is what
    torch would have given."""
    case, scale = inputs.case, inputs.case.head_dim**-0.5
    out = torch.zeros(inputs.q.shape, dtype=dtype, device=inputs.q.device)
    lse = torch.full(inputs.q.shape[:2], float("-inf"), dtype=dtype, device=inputs.q.device)
    group = case.query_heads // case.kv_heads
    for row, (k, v) in enumerate(inputs.rows()):
        if not case.lengths[row]:
            continue
        keys = k.to(dtype).repeat_interleave(group, 1).transpose(0, 1)
        values = v.to(dtype).repeat_interleave(group, 1).transpose(0, 1)
        scores = (keys @ inputs.q[row].to(dtype)[:, :, None])[:, :, 0] * scale
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        if case.window:
            scores[:, : max(0, case.lengths[row] - case.window)] = float("-inf")
        lse[row] = scores.logsumexp(-1)
        out[row] = (scores.softmax(-1)[:, None] @ values)[:, 0]
    return out, lse


def check_decode(inputs: DecodeInputs) -> None:
    """Error at most BOUND times torch's own, padding rows 0, sentinels untouched."""
    case, rows = inputs.case, len(inputs.case.lengths)
    device = inputs.q.device
    attention = DecodeAttention(inputs.layout, case.query_heads, rows, case.splits, device)
    guarded = torch.full((rows + 2, *inputs.q.shape[1:]), 7.0, dtype=case.dtype, device=device)
    out, lse = guarded[1:-1], torch.empty(inputs.q.shape[:2], device=device)
    attention(
        inputs.q, inputs.cache[0], inputs.tables, inputs.lengths, out,
        scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap, lse=lse,
    )  # fmt: skip
    truth, true_lse = decode_oracle(inputs, torch.float64)
    torch_error = error(decode_oracle(inputs, case.dtype)[0], truth)
    ours = error(out, truth)
    # Log-sum-exps of some hundred, by which splits are merged, are known to 1e-5 in fp32.
    slack = 1e-5 if case.magnitude > 1 else 1e-6
    assert ours <= BOUND * torch_error + slack, (ours, torch_error)
    finite = true_lse.isfinite()
    assert torch.equal(finite, lse.isfinite())
    assert error(lse[finite], true_lse[finite]) < 1e-3
    assert (guarded[0] == 7).all()
    assert (guarded[-1] == 7).all()
    for row, length in enumerate(case.lengths):
        assert length or (out[row] == 0).all()


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, of the whole; NaN counts as infinite."""
    difference = (ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)
    return float("inf") if difference.isnan() else float(difference)


def check_add_rms_norm(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(rows)
    x, residual = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(width, device=device).to(dtype)
    total = (x.double() + residual.double()).to(dtype).double()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    truth = total * scale * weight.double()
    theirs = torch.rms_norm(total.to(dtype), (width,), weight, 1e-5)
    out = torch.full_like(x, float("nan"))
    add_rms_norm(x, residual, weight, out, eps=1e-5)
    if INTERPRET:
        assert error(residual, total) < 2**-8
    else:
        assert torch.equal(residual.double(), total)
    assert error(out, truth) <= BOUND * error(theirs, truth) + 1e-6
    add_rms_norm(residual, None, weight, out, eps=1e-5)
    assert error(out, truth) <= BOUND * error(theirs, truth) + 1e-6


def check_silu_mul(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(width)
    gate_up = torch.randn(rows, 2 * width, device=device).to(dtype)
    gate, up = gate_up.double().split(width, -1)
    truth = gate * torch.sigmoid(gate) * up
    theirs = torch.nn.functional.silu(gate_up[:, :width]) * gate_up[:, width:]
    out = torch.full((rows, width), float("nan"), dtype=dtype, device=device)
    silu_mul(gate_up, out)
    assert error(out, truth) <= BOUND * error(theirs, truth) + 1e-6


def check_rope_store(
    case: DecodeCase,
    tokens: int,
    *,
    normed: bool,
    device: str,
    kernel: Callable[..., None] = rope_store,
) -> None:
    torch.manual_seed(tokens)
    dim, half = case.head_dim, case.head_dim // 2
    blocks = tokens // case.block_tokens + 4
    layout = GpuKvLayout(1, blocks, case.kv_heads, case.block_tokens, dim)
    heads = case.query_heads + 2 * case.kv_heads
    qkv = torch.randn(tokens, heads, dim, device=device).to(case.dtype)
    positions = torch.randint(0, 50, (tokens,), device=device)
    slots = torch.randperm(blocks * case.block_tokens, device=device)[:tokens]
    slots[-1] = -1
    angles = torch.outer(torch.arange(50.0), 1e4 ** -(torch.arange(half) / half)).to(device)
    cos_sin = torch.stack([angles.cos(), angles.sin()], 1).contiguous()
    norm = torch.randn(2, dim, device=device).to(case.dtype) if normed else None
    q = torch.full((tokens, case.query_heads, dim), float("nan"), device=device).to(case.dtype)
    cache = torch.full(layout.shape[1:], 7.0, device=device).to(case.dtype)
    kernel(qkv, cos_sin, positions, slots, q, cache, layout, qk_norm=norm, eps=1e-5)

    x = qkv.double()
    if norm is not None:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        weights = torch.ones(heads, dim, dtype=torch.float64, device=device)
        weights[: case.query_heads] = norm[0]
        weights[case.query_heads : -case.kv_heads] = norm[1]
        normed_x = x * scale * weights
        x = torch.cat([normed_x[:, : -case.kv_heads], x[:, -case.kv_heads :]], 1)
    cos, sin = cos_sin.double()[positions].unbind(1)
    low, high = x[..., :half], x[..., half:]
    rotated = torch.cat(
        [low * cos[:, None] - high * sin[:, None], high * cos[:, None] + low * sin[:, None]], -1
    )
    bound = 1e-6 if case.dtype == torch.float32 else 2e-2
    assert error(q, rotated[:, : case.query_heads]) < bound
    expected = torch.full(layout.shape[1:], 7.0, dtype=torch.float64, device=device)
    size = case.block_tokens
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // size, 0, :, slot % size] = rotated[
                t, case.query_heads : -case.kv_heads
            ]
            expected[slot // size, 1, :, slot % size] = x[t, -case.kv_heads :]
    untouched = expected == 7
    assert torch.equal(cache.double()[untouched], expected[untouched])
    assert error(cache, expected) < bound
