"""One layer of the host pool's blocks into staging, and the new tokens of staging out again, while
the device computes other layers.

    arrive   the layer before has left the ring; wait until this layer's blocks are in it
    unpack   ring -> staging        all that was computed before, one layer ahead
    put      staging -> host pool   K and V of the tokens that this sweep computes

The device's copy engine brings the blocks into a ring of two layers in the host's layout; words of
device memory say how far it and the sweep have come. A kernel that read the pool itself would take
multiprocessors from the sweep for as long as the link takes (docs/perf-log.md, "Deferred attention
on a GPU"); these are at the speed of the device's memory. What to move is read from device memory,
the pool's address included: a CUDA graph outlives an epoch, and without anything to move they end
at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.host_pieces import host_order, move, piece_bytes, quantise, to_host_order
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.tensors import FLOATS, INTERPRET, check
from kernels.gpu.words import load_acquire, nanoseconds, store_release, trap

RING = 2
"""Layers in the ring."""
_UNPACKING = 64
_PUTTING = 16
"""Programs, each of which walks over many pieces. As few put as keep the link busy."""
_DEADLINE_NS = 900_000_000_000
"""Whoever queues the copies may be stopped for as long as a lease may be (600 s), and go on. Copies
that do not come then were never queued."""
_POLLS = 64
"""Looks at the word between two at the clock."""


@triton.jit(do_not_specialize=["layer"])
def _arrive_kernel(words_ptr, counts_ptr, layer, deadline_ns, POLLS: tl.constexpr):
    if tl.load(counts_ptr) > 0:
        number = tl.load(counts_ptr + 2) + layer
        brought = words_ptr.to(tl.int64)
        store_release(brought + 4, number)
        start, polls = nanoseconds(), 0
        while load_acquire(brought) - number < 1:
            polls += 1
            if polls % POLLS == 0 and nanoseconds() - start > deadline_ns:
                trap()


@triton.jit
def _region(pool_ptr, layer, block, head, KV_HEADS: tl.constexpr, REGION_BYTES: tl.constexpr):
    """Address of one head's K, V and scales of a host block."""
    at = tl.load(pool_ptr) + layer.to(tl.int64) * tl.load(pool_ptr + 1)
    return at + (block.to(tl.int64) * KV_HEADS + head) * REGION_BYTES


@triton.jit
def _unpack_kernel(
    staging_ptr,  # [blocks][2][KV_HEADS][BLOCK][DIM]
    ring_ptr,  # uint8 [blocks][KV_HEADS][region]
    moves_ptr,  # int32: blocks of both
    counts_ptr,  # int32 [3]
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    W: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = BLOCK * DIM
    dtype: tl.constexpr = tl.int8 if QUANTISED else staging_ptr.dtype.element_ty
    size: tl.constexpr = dtype.primitive_bitwidth // 8
    region: tl.constexpr = 2 * half * size + (8 * BLOCK if QUANTISED else 0)
    pieces = tl.load(counts_ptr) * KV_HEADS
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        head, block = piece % KV_HEADS, tl.load(moves_ptr + piece // KV_HEADS).to(tl.int64)
        address = ring_ptr + (block * KV_HEADS + head) * region
        # Without the hint the compiler knows of no alignment, and loads element by element.
        host = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
        scales = tl.multiple_of((address + 2 * half * size).to(tl.pointer_type(tl.float32)), 16)
        target = staging_ptr + (block * 2 * KV_HEADS + head) * half
        move(target, host, scales, True, False, QUANTISED, BLOCK, DIM, DIM_PAD, W)
        move(
            target + KV_HEADS * half, host + half, scales + BLOCK, False,
            False, QUANTISED, BLOCK, DIM, DIM_PAD, W,
        )  # fmt: skip


@triton.jit
def _tokens_in_host_order(
    IS_KEY: tl.constexpr, BLOCK: tl.constexpr, DIM_PAD: tl.constexpr, W: tl.constexpr
):
    """The token of each element of a padded tile, turned."""
    at = tl.arange(0, BLOCK * DIM_PAD)
    if IS_KEY:
        return at // (16 * DIM_PAD) * 16 + at % (16 * W) // W
    return at // (W * DIM_PAD) * W + at % W


@triton.jit
def _put(
    source, host, scales, first, end, IS_KEY: tl.constexpr, QUANTISED: tl.constexpr,
    BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Tokens from `first` to `end` of one head's K or V; the block's others may be anything."""
    token, dim = tl.arange(0, BLOCK), tl.arange(0, DIM_PAD)
    new = (token >= first) & (token < end)
    ok = (dim < DIM)[None, :] & new[:, None]
    x = tl.load(source + token[:, None] * DIM + dim[None, :], mask=ok, other=0.0)
    if QUANTISED:
        x, scale = quantise(x.to(tl.float32))
        tl.store(scales + token, scale, mask=new)
    offset, exists = host_order(IS_KEY, BLOCK, DIM, DIM_PAD, W)
    turned = _tokens_in_host_order(IS_KEY, BLOCK, DIM_PAD, W)
    exists = exists & (turned >= first) & (turned < end)
    tl.store(host + offset, to_host_order(x, IS_KEY, BLOCK, DIM_PAD, W), mask=exists)


@triton.jit(do_not_specialize=["layer"])
def _put_kernel(
    staging_ptr,  # [blocks][2][KV_HEADS][BLOCK][DIM]
    moves_ptr,  # int32 [4, most]: staging blocks, host blocks, first new tokens, their ends
    counts_ptr,  # int32 [3]
    pool_ptr,  # int64 [2]
    layer, most,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    W: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = BLOCK * DIM
    dtype: tl.constexpr = tl.int8 if QUANTISED else staging_ptr.dtype.element_ty
    size: tl.constexpr = dtype.primitive_bitwidth // 8
    region: tl.constexpr = 2 * half * size + (8 * BLOCK if QUANTISED else 0)
    pieces = tl.load(counts_ptr + 1) * KV_HEADS
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        entry, head = piece // KV_HEADS, piece % KV_HEADS
        staged, block = tl.load(moves_ptr + entry), tl.load(moves_ptr + most + entry)
        first, end = (
            tl.load(moves_ptr + 2 * most + entry),
            tl.load(moves_ptr + 3 * most + entry),
        )
        address = _region(pool_ptr, layer, block, head, KV_HEADS, region)
        host = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
        scales = tl.multiple_of((address + 2 * half * size).to(tl.pointer_type(tl.float32)), 16)
        source = staging_ptr + (staged.to(tl.int64) * 2 * KV_HEADS + head) * half
        values, target = source + KV_HEADS * half, host + half
        if (first == 0) & (end == BLOCK):
            # Whole blocks, of prompts, leave 16 bytes at a time; tokens are scattered in them.
            move(source, host, scales, True, True, QUANTISED, BLOCK, DIM, DIM_PAD, W)
            move(values, target, scales + BLOCK, False, True, QUANTISED, BLOCK, DIM, DIM_PAD, W)
        else:
            _put(source, host, scales, first, end, True, QUANTISED, BLOCK, DIM, DIM_PAD, W)
            _put(
                values, target, scales + BLOCK, first, end, False,
                QUANTISED, BLOCK, DIM, DIM_PAD, W,
            )  # fmt: skip


class HostStream:
    """Launches them for any layer. dtype: the host pool's; the cache's, or int8."""

    def __init__(self, layout: GpuKvLayout, dtype: torch.dtype) -> None:
        if dtype not in (*FLOATS, torch.int8):
            raise ValueError(f"the host pool's type must be a float or int8, not {dtype}")
        self.layout = layout
        self.dtype = dtype
        self.piece_bytes = piece_bytes(layout, dtype)
        self._constants = {
            "KV_HEADS": layout.kv_heads,
            "BLOCK": layout.block_tokens,
            "DIM": layout.head_dim,
            "DIM_PAD": triton.next_power_of_2(layout.head_dim),
            "W": {torch.bfloat16: 2, torch.int8: 4}.get(dtype, 1),
            "QUANTISED": dtype == torch.int8,
        }

    def arrive(self, layer: int, words: torch.Tensor, counts: torch.Tensor) -> None:
        """Wait, if there is anything to unpack, until the layer is in the ring: `words[0]`, which
        who copies sets, has come to `counts[2] + layer + 1`. `words[1]` tells it `counts[2] +
        layer`: the layers before have been unpacked. words: int32 `[2]`. counts: int32 `[3]`."""
        check("words", words, (2,), torch.int32)
        check("counts", counts, (3,), torch.int32)
        if INTERPRET:
            there = words[0] - counts[2] - layer
            assert not counts[0] or there >= 1, "nobody works beside the interpreter"
        _arrive_kernel[(1,)](words, counts, layer, _DEADLINE_NS, POLLS=_POLLS, num_warps=1)

    def unpack(
        self, ring: torch.Tensor, staging: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """`staging[b]` = `ring[b]` for `b` in `moves[:counts[0]]`.

        ring: uint8 `[blocks, piece_bytes]`. staging: `[blocks, 2, kv_heads, block_tokens,
        head_dim]`. moves: int32. counts: int32 `[3]`.
        """
        check("ring", ring, (len(staging), self.piece_bytes), torch.uint8)
        check("moves", moves, (-1,), torch.int32)
        self._check(staging, counts)
        _unpack_kernel[(_UNPACKING,)](
            staging, ring, moves, counts, **self._constants, num_warps=4, enable_fp_fusion=False
        )

    def put(
        self,
        layer: int,
        staging: torch.Tensor,
        moves: torch.Tensor,
        counts: torch.Tensor,
        pool: torch.Tensor,
    ) -> None:
        """The layer's host block `moves[1, i]` = `staging[moves[0, i]]` from token `moves[2, i]` to
        `moves[3, i]` for `i < counts[1]`; its other tokens stay.

        staging, counts: as in `unpack`. moves: int32 `[4, most]`. pool: int64 `[2]`, the host
        pool's address and the bytes of one layer of it.
        """
        check("moves", moves, (4, -1), torch.int32)
        check("pool", pool, (2,), torch.int64)
        self._check(staging, counts)
        _put_kernel[(_PUTTING,)](
            staging, moves, counts, pool, layer, moves.shape[1], **self._constants,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip

    def _check(self, staging: torch.Tensor, counts: torch.Tensor) -> None:
        check("staging", staging, (-1, *self.layout.shape[2:]), *FLOATS)
        check("counts", counts, (3,), torch.int32)
        if self.dtype not in (staging.dtype, torch.int8):
            raise ValueError(f"staging of {staging.dtype} does not go into a pool of {self.dtype}")
