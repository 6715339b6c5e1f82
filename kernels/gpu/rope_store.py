"""What stands between the QKV projection and attention, in one pass: Q/K norm (Qwen3), rotary
embedding (Su et al. 2021, arXiv 2104.09864), and K and V stored into the paged cache.

A program takes several heads of one token: with a single head it moved 256 bytes and reached a
third of the memory's bandwidth. Halves are rotated, as Llama does: element i with i + head_dim / 2.
The floor is bytes: qkv read once, written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.tensors import FLOATS, check


@triton.jit(do_not_specialize=["staging_shift"])
def _rope_store_kernel(
    qkv_ptr,  # [tokens, QUERY_HEADS + 2 * KV_HEADS, DIM]
    cos_sin_ptr,  # [positions, 2, DIM / 2]
    positions_ptr,  # int64 [tokens]
    slots_ptr,  # int64 [tokens]; -1: a padding row, nothing is stored
    qk_norm_ptr,  # [2, DIM] weights of Q's and K's norm
    q_ptr,  # [tokens, QUERY_HEADS, DIM]
    kv_ptr,  # one layer of the cache
    eps,
    staging_shift,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    STAGED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    all_heads: tl.constexpr = QUERY_HEADS + 2 * KV_HEADS
    half: tl.constexpr = DIM // 2
    head, at = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF_PAD)
    ok = (head < all_heads)[:, None] & (at < half)[None, :]
    source = qkv_ptr + (token * all_heads + head)[:, None] * DIM + at[None, :]
    low = tl.load(source, mask=ok, other=0.0)
    high = tl.load(source + half, mask=ok, other=0.0)
    x, y = low.to(tl.float32), high.to(tl.float32)
    is_query = head < QUERY_HEADS
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / DIM + eps)
        weights = qk_norm_ptr + tl.where(is_query, 0, DIM)[:, None] + at[None, :]
        x = x * scale[:, None] * tl.load(weights, mask=ok, other=0.0).to(tl.float32)
        y = y * scale[:, None] * tl.load(weights + half, mask=ok, other=0.0).to(tl.float32)
    table = cos_sin_ptr + tl.load(positions_ptr + token) * DIM + at
    cos = tl.load(table, mask=at < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(table + half, mask=at < half, other=0.0).to(tl.float32)[None, :]
    dtype = q_ptr.dtype.element_ty
    is_value = (head >= QUERY_HEADS + KV_HEADS)[:, None]
    low = tl.where(is_value, low, (x * cos - y * sin).to(dtype))
    high = tl.where(is_value, high, (y * cos + x * sin).to(dtype))

    target = q_ptr + (token * QUERY_HEADS + head)[:, None] * DIM + at[None, :]
    tl.store(target, low, mask=ok & is_query[:, None])
    tl.store(target + half, high, mask=ok & is_query[:, None])
    slot = tl.load(slots_ptr + token)
    # K heads, then V heads: the order inside a piece.
    block = slot // BLOCK
    if STAGED:
        block += tl.where(block >= STAGED, staging_shift, 0)
    place = block * (2 * KV_HEADS * BLOCK * DIM) + (slot % BLOCK) * DIM
    offset = (head - QUERY_HEADS) * (BLOCK * DIM)
    target = kv_ptr + place + offset[:, None] + at[None, :]
    stored = ok & (head >= QUERY_HEADS)[:, None] & (slot >= 0)
    tl.store(target, low, mask=stored)
    tl.store(target + half, high, mask=stored)


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
    layer: int = 0,
) -> None:
    """Rotate Q into `q` and K and V into the cache.

    qkv: `[tokens, query_heads + 2 * kv_heads, head_dim]`. cos_sin: `[positions, 2, head_dim / 2]`,
    of qkv's dtype or fp32. positions, slots: int64 `[tokens]`; a slot of -1 stores nothing. q:
    `[tokens, query_heads, head_dim]`. layer_kv: one layer of the cache; `layer`: which one, where
    slots name staging. qk_norm: `[2, head_dim]` weights of Q's and K's RMSNorm.
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
    all_heads = query_heads + 2 * layout.kv_heads
    # 4 KiB a program; fewer for few tokens, which need programs more than large ones.
    padded = triton.next_power_of_2(dim)
    heads = min(2048 // padded, triton.next_power_of_2(all_heads))
    if tokens < 256:
        heads = min(heads, 4)
    _rope_store_kernel[(tokens, triton.cdiv(all_heads, heads))](
        qkv,
        cos_sin,
        positions,
        slots,
        qkv if qk_norm is None else qk_norm,
        q,
        layer_kv,
        eps,
        layout.staging_shift(layer),
        QUERY_HEADS=query_heads,
        KV_HEADS=layout.kv_heads,
        DIM=dim,
        HALF_PAD=triton.next_power_of_2(dim // 2),
        BLOCK=layout.block_tokens,
        HEADS=heads,
        HAS_NORM=qk_norm is not None,
        STAGED=layout.staged_from,
        num_warps=max(1, heads * padded // 512),
    )
