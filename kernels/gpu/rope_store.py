"""What stands between the QKV projection and attention, in one pass: Q/K norm (Qwen3), rotary
embedding (Su et al. 2021, arXiv 2104.09864), and K and V stored into the paged cache.

One program per (token, head). Halves are rotated, as Llama does: element i with i + head_dim / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.tensors import FLOATS, check


@triton.jit
def _rope_store_kernel(
    qkv_ptr,  # [tokens, QUERY_HEADS + 2 * KV_HEADS, DIM]
    cos_sin_ptr,  # [positions, 2, DIM / 2]
    positions_ptr,  # int64 [tokens]
    slots_ptr,  # int64 [tokens]; -1: a padding row, nothing is stored
    qk_norm_ptr,  # [2, DIM] weights of Q's and K's norm
    q_ptr,  # [tokens, QUERY_HEADS, DIM]
    kv_ptr,  # one layer of the cache
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    at = tl.arange(0, HALF_PAD)
    ok = at < half
    source = qkv_ptr + (token * (QUERY_HEADS + 2 * KV_HEADS) + head) * DIM
    low = tl.load(source + at, mask=ok, other=0.0)
    high = tl.load(source + half + at, mask=ok, other=0.0)
    dtype = q_ptr.dtype.element_ty
    if head < QUERY_HEADS + KV_HEADS:
        x, y = low.to(tl.float32), high.to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / DIM + eps)
            weights = qk_norm_ptr + tl.where(head < QUERY_HEADS, 0, DIM)
            w = tl.load(weights + at, mask=ok, other=0.0).to(tl.float32)
            z = tl.load(weights + half + at, mask=ok, other=0.0).to(tl.float32)
            x = x * scale * w
            y = y * scale * z
        table = cos_sin_ptr + tl.load(positions_ptr + token) * DIM
        cos = tl.load(table + at, mask=ok, other=0.0).to(tl.float32)
        sin = tl.load(table + half + at, mask=ok, other=0.0).to(tl.float32)
        low = (x * cos - y * sin).to(dtype)
        high = (y * cos + x * sin).to(dtype)
    if head < QUERY_HEADS:
        target = q_ptr + (token * QUERY_HEADS + head) * DIM
        tl.store(target + at, low, mask=ok)
        tl.store(target + half + at, high, mask=ok)
    else:
        slot = tl.load(slots_ptr + token)
        index = head - QUERY_HEADS  # K heads, then V heads: the order inside a piece
        place = (slot // BLOCK) * (2 * KV_HEADS * BLOCK * DIM) + index * (BLOCK * DIM)
        target = kv_ptr + place + (slot % BLOCK) * DIM
        stored = ok & (slot >= 0)
        tl.store(target + at, low, mask=stored)
        tl.store(target + half + at, high, mask=stored)


def rope_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor,
    layer_kv: torch.Tensor,
    layout: GpuKvLayout,
    *,
    qk_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Rotate Q into `q` and K and V into the cache.

    qkv: `[tokens, query_heads + 2 * kv_heads, head_dim]`. cos_sin: `[positions, 2, head_dim / 2]`,
    of qkv's dtype or fp32. positions, slots: int64 `[tokens]`; a slot of -1 stores nothing. q:
    `[tokens, query_heads, head_dim]`. layer_kv: one layer of the cache. qk_norm: `[2, head_dim]`
    weights of Q's and K's RMSNorm.
    """
    tokens, query_heads, dim = q.shape
    check("qkv", qkv, (tokens, query_heads + 2 * layout.kv_heads, dim), *FLOATS)
    check("cos_sin", cos_sin, (-1, 2, dim // 2), qkv.dtype, torch.float32)
    check("positions", positions, (tokens,), torch.int64)
    check("slots", slots, (tokens,), torch.int64)
    check("q", q, (tokens, query_heads, layout.head_dim), qkv.dtype)
    check("layer_kv", layer_kv, layout.shape[1:], qkv.dtype)
    if qk_norm is not None:
        check("qk_norm", qk_norm, (2, dim), qkv.dtype)
    _rope_store_kernel[(tokens, query_heads + 2 * layout.kv_heads)](
        qkv,
        cos_sin,
        positions,
        slots,
        qkv if qk_norm is None else qk_norm,
        q,
        layer_kv,
        eps,
        QUERY_HEADS=query_heads,
        KV_HEADS=layout.kv_heads,
        DIM=dim,
        HALF_PAD=triton.next_power_of_2(dim // 2),
        BLOCK=layout.block_tokens,
        HAS_NORM=qk_norm is not None,
        num_warps=1,
    )
