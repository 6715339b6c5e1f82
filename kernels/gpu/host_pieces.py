"""KV blocks between the GPU tier's cache and the host pool's layout, quantised on the way or not.

    GPU   [K | V][kv_heads][block_tokens][head_dim]                 kernels/gpu/kv_cache.py
    host  [kv_heads] of  K | V | K scales | V scales (int8 only)    kernels/cpu/csrc/kv_piece.hpp
          K  [block_tokens / 16][head_dim / w][16 tokens][w dims]   w = 2 for bf16, 4 for int8,
          V  [block_tokens / w][head_dim][w tokens]                     1 for fp16 and fp32

A program turns one head's K or V of one block in registers, so that both sides are whole runs of
memory. `host` is any memory that the device can reach: a staging buffer on either side of the bus,
or the pool itself where it is registered. Bits are those that `KvPool` of kernels.cpu writes and
reads. The floor is bytes, usually PCIe's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.tensors import FLOATS, check

HOST_LAYOUT_VERSION = 2
"""kernels.cpu.LAYOUT_VERSION that this file means."""

_TILE_TOKENS = 16


@dataclass(frozen=True)
class Programs:
    """They walk over all that is moved, layer by layer. Beside a sweep each takes a multiprocessor
    away from dense layers, whose programs fill the registers of one: so there are few, and each has
    much under way. Quantising takes more of them."""

    count: int
    warps: int
    heads: int
    """Of one block, that a program moves in one turn; all turns have as many."""


def piece_bytes(layout: GpuKvLayout, dtype: torch.dtype) -> int:
    """One block of one layer in a host pool of that type: `kernels.cpu.KvLayout.piece_bytes`."""
    scales = 8 * layout.block_tokens * layout.kv_heads if dtype == torch.int8 else 0
    return layout.piece_elements * dtype.itemsize + scales


def programs_of(layout: GpuKvLayout, dtype: torch.dtype) -> Programs:
    """For a host pool of that type."""
    if dtype == torch.int8:
        return Programs(16, 4, 1)
    most = max(1, (1 << 15) * layout.kv_heads // (layout.piece_elements * dtype.itemsize))
    heads = (n for n in range(1, layout.kv_heads + 1) if layout.kv_heads % n == 0 and n <= most)
    return Programs(4, 8, max(heads))


@triton.jit
def host_order(
    IS_KEY: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    W: tl.constexpr,
):
    """Offsets in a host region's K or V of the padded tile's elements, turned; which ones exist."""
    at = tl.arange(0, BLOCK * DIM_PAD)
    if DIM == DIM_PAD:
        # Said by itself: from the divisions below the compiler does not see that it may store
        # 16 bytes at a time.
        return at, at >= 0
    if IS_KEY:
        inner, outer = at % (16 * W), at // (16 * W)
        dim = outer % (DIM_PAD // W) * W + inner % W
        offset = (outer // (DIM_PAD // W)) * (16 * DIM) + outer % (DIM_PAD // W) * (16 * W) + inner
    else:
        dim = at // W % DIM_PAD
        offset = (at // (W * DIM_PAD)) * (W * DIM) + dim * W + at % W
    return offset, dim < DIM


@triton.jit
def to_host_order(
    x, IS_KEY: tl.constexpr, BLOCK: tl.constexpr, DIM_PAD: tl.constexpr, W: tl.constexpr
):
    if IS_KEY:
        tiles = tl.reshape(x, (BLOCK // 16, 16, DIM_PAD // W, W))
        return tl.reshape(tl.permute(tiles, (0, 2, 1, 3)), (BLOCK * DIM_PAD,))
    tiles = tl.reshape(x, (BLOCK // W, W, DIM_PAD))
    return tl.reshape(tl.permute(tiles, (0, 2, 1)), (BLOCK * DIM_PAD,))


@triton.jit
def from_host_order(
    x, IS_KEY: tl.constexpr, BLOCK: tl.constexpr, DIM_PAD: tl.constexpr, W: tl.constexpr
):
    if IS_KEY:
        tiles = tl.reshape(x, (BLOCK // 16, DIM_PAD // W, 16, W))
        return tl.reshape(tl.permute(tiles, (0, 2, 1, 3)), (BLOCK, DIM_PAD))
    tiles = tl.reshape(x, (BLOCK // W, DIM_PAD, W))
    return tl.reshape(tl.permute(tiles, (0, 2, 1)), (BLOCK, DIM_PAD))


@triton.jit
def quantise(x):
    """int8 and scale of each row, as kv_piece.hpp: NaN and infinity show as a scale of NaN."""
    largest = tl.max(tl.where(x == x, tl.abs(x), 0.0), 1)
    poison = tl.sum(x * 0.0, 1)
    usable = (largest > 0.0) & (poison == 0.0)
    inverse = tl.where(usable, tl.div_rn(127.0, tl.where(usable, largest, 1.0)), 0.0)
    scaled = tl.where(usable[:, None], x * inverse[:, None], 0.0)
    # To the nearest, of two the even one: 1.5 * 2^23 leaves no place for a fraction.
    rounded = (scaled + 12582912.0) - 12582912.0
    return rounded.to(tl.int8), tl.div_rn(largest, 127.0) + poison


@triton.jit
def _as(x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest even in the interpreter too, which truncates to bf16."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def move(
    cache_ptr, host_ptr, scales_ptr, IS_KEY: tl.constexpr, TO_HOST: tl.constexpr,
    QUANTISED: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """K or V of one head and block."""
    token, dim = tl.arange(0, BLOCK), tl.arange(0, DIM_PAD)
    place = token[:, None] * DIM + dim[None, :]
    ok = (dim < DIM)[None, :] & (token >= 0)[:, None]
    offset, exists = host_order(IS_KEY, BLOCK, DIM, DIM_PAD, W)
    if TO_HOST:
        x = tl.load(cache_ptr + place, mask=ok, other=0.0)
        if QUANTISED:
            x, scale = quantise(x.to(tl.float32))
            tl.store(scales_ptr + token, scale)
        tl.store(host_ptr + offset, to_host_order(x, IS_KEY, BLOCK, DIM_PAD, W), mask=exists)
    else:
        x = tl.load(host_ptr + offset, mask=exists, other=0)
        x = from_host_order(x, IS_KEY, BLOCK, DIM_PAD, W)
        if QUANTISED:
            x = x.to(tl.float32) * tl.load(scales_ptr + token)[:, None]
            x = _as(x, cache_ptr.dtype.element_ty)
        tl.store(cache_ptr + place, x, mask=ok)


@triton.jit(do_not_specialize=["moved", "turns"])
def _pieces_kernel(
    cache_ptr,  # [layers, blocks, 2, KV_HEADS, BLOCK, DIM]
    blocks_ptr,  # int32 [moved]
    host_ptr,  # [layers, host blocks, pieces], of the host's element type
    scales_ptr,  # the same memory as fp32
    host_blocks_ptr,  # int32 [moved]; -1: nothing is moved
    cache_blocks,
    host_blocks,
    moved,
    turns,  # layers * moved * KV_HEADS / HEADS
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    W: tl.constexpr,
    TO_HOST: tl.constexpr,
    QUANTISED: tl.constexpr,
    HEADS: tl.constexpr,
):
    groups: tl.constexpr = KV_HEADS // HEADS
    half: tl.constexpr = BLOCK * DIM
    # Elements of a region: for int8 with two scales of 4 bytes a token.
    region: tl.constexpr = 2 * (half + 4 * BLOCK) if QUANTISED else 2 * half
    for turn in range(tl.program_id(0), turns, tl.num_programs(0)):
        first, index = turn % groups * HEADS, turn // groups % moved
        layer = (turn // groups // moved).to(tl.int64)
        block, host_block = tl.load(blocks_ptr + index), tl.load(host_blocks_ptr + index)
        if host_block >= 0:
            for head in tl.static_range(HEADS):
                at = (layer * cache_blocks + block) * 2 * KV_HEADS + first + head
                cache = cache_ptr + at * half
                place = ((layer * host_blocks + host_block) * KV_HEADS + first + head) * region
                scales, host = scales_ptr + (place + 2 * half) // 4, host_ptr + place
                move(cache, host, scales, True, TO_HOST, QUANTISED, BLOCK, DIM, DIM_PAD, W)
                move(
                    cache + KV_HEADS * half, host + half, scales + BLOCK, False,
                    TO_HOST, QUANTISED, BLOCK, DIM, DIM_PAD, W,
                )  # fmt: skip


class HostPieces:
    """Moves whole blocks of any number of layers. dtype: the host pool's; the cache's, or int8."""

    def __init__(self, layout: GpuKvLayout, dtype: torch.dtype) -> None:
        if dtype not in (*FLOATS, torch.int8):
            raise ValueError(f"the host pool's type must be a float or int8, not {dtype}")
        self.layout = layout
        self.dtype = dtype
        self._programs = programs_of(layout, dtype)
        self.piece_bytes = piece_bytes(layout, dtype)

    def write(
        self,
        cache: torch.Tensor,
        blocks: torch.Tensor,
        host: torch.Tensor,
        host_blocks: torch.Tensor,
    ) -> None:
        """Demote: `host[:, host_blocks[i]] = cache[:, blocks[i]]`.

        cache: `[layers, blocks, 2, kv_heads, block_tokens, head_dim]`, any number of layers. host:
        uint8 `[layers, host blocks, piece_bytes]` in memory that the device can reach. blocks,
        host_blocks: int32 `[moved]`; entries with a host block of -1 are left out.
        """
        self._launch(cache, blocks, host, host_blocks, to_host=True)

    def read(
        self,
        host: torch.Tensor,
        host_blocks: torch.Tensor,
        cache: torch.Tensor,
        blocks: torch.Tensor,
    ) -> None:
        """Promote: `cache[:, blocks[i]] = host[:, host_blocks[i]]`; arguments as in `write`."""
        self._launch(cache, blocks, host, host_blocks, to_host=False)

    def _launch(
        self,
        cache: torch.Tensor,
        blocks: torch.Tensor,
        host: torch.Tensor,
        host_blocks: torch.Tensor,
        *,
        to_host: bool,
    ) -> None:
        layout, layers = self.layout, cache.shape[0]
        check("cache", cache, (-1, -1, *layout.shape[2:]), *FLOATS)
        check("host", host, (layers, -1, self.piece_bytes), torch.uint8)
        check("blocks", blocks, (-1,), torch.int32)
        check("host_blocks", host_blocks, blocks.shape, torch.int32)
        if self.dtype not in (cache.dtype, torch.int8):
            raise ValueError(f"a cache of {cache.dtype} does not go into a pool of {self.dtype}")
        if not blocks.numel():
            return
        quantised = self.dtype == torch.int8
        turns = layers * blocks.numel() * layout.kv_heads // self._programs.heads
        _pieces_kernel[(min(turns, self._programs.count),)](
            cache,
            blocks,
            host.view(self.dtype),
            host.view(torch.float32),
            host_blocks,
            cache.shape[1],
            host.shape[1],
            blocks.numel(),
            turns,
            KV_HEADS=layout.kv_heads,
            BLOCK=layout.block_tokens,
            DIM=layout.head_dim,
            DIM_PAD=triton.next_power_of_2(layout.head_dim),
            W={torch.bfloat16: 2, torch.int8: 4}.get(self.dtype, 1),
            TO_HOST=to_host,
            QUANTISED=quantised,
            HEADS=self._programs.heads,
            num_warps=self._programs.warps,
            # A fused multiply-add would round halves another way than the CPU.
            enable_fp_fusion=False,
        )
