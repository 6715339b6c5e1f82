"""Causal attention of prompt chunks over the paged cache: earlier tokens and the chunk's own.

    program (chunk, tile of its tokens, KV head): all query heads of the group for those tokens

As flash attention 2 (arXiv 2307.08691): one pass over K and V with a running softmax. Tokens and
query heads are the rows of one `tl.dot`, so K and V are read once for the group. The chunk's own K
and V are in the cache before the launch. Chunks are told apart on the device, so a CUDA graph can
keep the grid: programs past a chunk's end return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.decode_attention import LOG2_E, MAX_GROUP
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.tensors import FLOATS, INTERPRET, check


@triton.jit
def _attend(
    q,
    top,
    total,
    acc,
    begin,
    end,
    position,
    length,
    kv_ptr,
    table_ptr,
    head,
    kv_heads,
    scale_log2,
    softcap,
    window,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The running softmax over tiles `begin` to `end`; `MASKED`: some tokens may be unseen."""
    dims, tokens = tl.arange(0, DIM_PAD), tl.arange(0, TILE)
    for tile in range(begin, end):
        at = tile * TILE + tokens
        inside = at < length
        block = tl.load(table_ptr + at // BLOCK, mask=inside, other=0)
        place = (block.to(tl.int64) * 2 * kv_heads + head) * (BLOCK * DIM) + at % BLOCK * DIM
        source = kv_ptr + place[:, None] + dims[None, :]
        ok = inside[:, None] & (dims < DIM)[None, :]
        k = tl.load(source, mask=ok, other=0.0)
        v = tl.load(source + kv_heads * BLOCK * DIM, mask=ok, other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        if MASKED:
            seen = at[None, :] <= position[:, None]
            seen &= (window <= 0) | (at[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Nothing may have been seen yet: -inf less -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top) * scale_log2
        shrink = tl.exp2(top * scale_log2 - base)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _prefill_kernel(
    q_ptr,  # [rows, kv_heads * GROUP, DIM]
    kv_ptr,  # one layer: [blocks][2][kv_heads][BLOCK][DIM]
    tables_ptr,  # int32 [chunks, table_stride]
    lengths_ptr,  # int32 [chunks]
    first_rows_ptr,  # int32 [chunks + 1]
    out_ptr,  # [rows, kv_heads * GROUP, DIM]
    table_stride,
    scale_log2,
    softcap,
    window,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    chunk, head, kv_heads = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    first_row = tl.load(first_rows_ptr + chunk)
    rows = tl.load(first_rows_ptr + chunk + 1) - first_row
    begin_row = tl.program_id(1) * ROWS
    if begin_row >= rows:
        return
    length = tl.load(lengths_ptr + chunk)
    context = length - rows
    lane = tl.arange(0, ROWS * GROUP_PAD)
    row, group = begin_row + lane // GROUP_PAD, lane % GROUP_PAD
    lane_ok = (row < rows) & (group < GROUP)
    position = context + row
    dims = tl.arange(0, DIM_PAD)
    place = ((first_row + row) * kv_heads + head).to(tl.int64) * GROUP + group
    ok = lane_ok[:, None] & (dims < DIM)[None, :]
    q = tl.load(q_ptr + place[:, None] * DIM + dims[None, :], mask=ok, other=0.0)
    q = q.to(tl.float32) if WIDEN else q
    # Padding lanes look like the tile's last row, so that they see something and stay finite.
    position = tl.minimum(position, length - 1)
    top = tl.full([ROWS * GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([ROWS * GROUP_PAD], tl.float32)
    acc = tl.zeros([ROWS * GROUP_PAD, DIM_PAD], tl.float32)
    first_position = context + begin_row
    last_position = tl.minimum(first_position + ROWS, length) - 1
    begin = tl.where(window > 0, tl.maximum(first_position - window + 1, 0), 0) // TILE
    end = last_position // TILE + 1
    # Tiles that every row sees whole; with a window the early ones are masked, too.
    plain = tl.where(window > 0, begin, (first_position + 1) // TILE)
    table_ptr = tables_ptr + chunk.to(tl.int64) * table_stride
    top, total, acc = _attend(
        q, top, total, acc, begin, plain, position, length, kv_ptr, table_ptr, head, kv_heads,
        scale_log2, softcap, window,
        DIM, DIM_PAD, BLOCK, TILE, False, HAS_SOFTCAP, WIDEN,
    )  # fmt: skip
    top, total, acc = _attend(
        q, top, total, acc, plain, end, position, length, kv_ptr, table_ptr, head, kv_heads,
        scale_log2, softcap, window,
        DIM, DIM_PAD, BLOCK, TILE, True, HAS_SOFTCAP, WIDEN,
    )  # fmt: skip
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place[:, None] * DIM + dims[None, :], out, mask=ok)


class PrefillAttention:
    """Launches attention of prompt chunks."""

    def __init__(self, layout: GpuKvLayout, query_heads: int) -> None:
        group, remainder = divmod(query_heads, layout.kv_heads)
        if remainder or not 1 <= group <= MAX_GROUP:
            raise ValueError(f"query_heads must be 1 to {MAX_GROUP} times kv_heads")
        self.layout = layout
        self.query_heads = query_heads
        self._group = group

    def __call__(
        self,
        q: torch.Tensor,
        layer_kv: torch.Tensor,
        block_tables: torch.Tensor,
        lengths: torch.Tensor,
        first_rows: torch.Tensor,
        out: torch.Tensor,
        *,
        longest: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        """Fill the chunks' rows of `out` `[rows, query_heads, head_dim]`; others stay as they are.

        q: like `out`. layer_kv: one layer of the cache, the chunks' own K and V in place.
        block_tables: int32 `[chunks, width]`. lengths: int32 `[chunks]`, tokens up to the chunk's
        end. first_rows: int32 `[chunks + 1]`: chunk c has the rows of q from `first_rows[c]` to
        `first_rows[c + 1]`, none if they are equal. longest: no chunk has more rows than that.
        """
        layout, chunks = self.layout, lengths.shape[0]
        check("q", q, (-1, self.query_heads, layout.head_dim), *FLOATS)
        check("out", out, q.shape, q.dtype)
        check("layer_kv", layer_kv, layout.shape[1:], q.dtype)
        check("block_tables", block_tables, (chunks, -1), torch.int32)
        check("lengths", lengths, (chunks,), torch.int32)
        check("first_rows", first_rows, (chunks + 1,), torch.int32)
        if scale <= 0:
            raise ValueError(f"scale must be more than 0, not {scale}")
        group_pad = triton.next_power_of_2(self._group)
        # Small sweeps need programs more than large tiles.
        lanes = 64 if longest <= 512 else 128
        rows = max(1, lanes // group_pad)
        wide = layout.head_dim > 128
        _prefill_kernel[(chunks, triton.cdiv(longest, rows), layout.kv_heads)](
            q,
            layer_kv,
            block_tables,
            lengths,
            first_rows,
            out,
            block_tables.stride(0),
            scale * LOG2_E,
            softcap / scale,
            window,
            GROUP=self._group,
            GROUP_PAD=group_pad,
            DIM=layout.head_dim,
            DIM_PAD=triton.next_power_of_2(layout.head_dim),
            BLOCK=layout.block_tokens,
            ROWS=rows,
            TILE=32 if wide else 64,
            HAS_SOFTCAP=softcap > 0,
            WIDEN=INTERPRET,
            num_warps=4 if lanes == 64 else 8,
            num_stages=3 if not wide else 2,
        )
