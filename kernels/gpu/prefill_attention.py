"""Causal attention of prompt chunks over the paged cache: tokens cached before and new ones alike.

    program (KV head, tile): up to `Tiling.rows` rows of one chunk, a row being a query head of
                             the group at a token, against all tokens those may see

    tokens  0 ........ window's edge ....... first row's ... last row's position
            | masked tiles | tiles seen whole, no mask | masked tiles on the diagonal |

As flash attention 2 (arXiv 2307.08691). A decode row is a chunk of one token, so any mix may come
in one call; DecodeAttention splits long contexts over programs and is better for single tokens. The
floor is arithmetic: 4 * head_dim operations for each (row, token) pair that is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.decode_attention import LOG2_E, MAX_GROUP
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.tensors import FLOATS, INTERPRET, check


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; the result does not depend on it but for rounding."""

    rows: int
    """Rows of a program, a power of two of at least 16."""
    tokens: int
    """Tokens of K and V at a time, a power of two of at least 16."""
    warps: int
    stages: int


@triton.jit
def _attend(
    q,
    top,
    total,
    acc,
    positions,  # [ROWS], of the rows' queries
    table_ptr,
    kv_ptr,  # first element of this head's K in block 0
    begin,
    end,
    oldest,
    kv_heads,
    scale_log2,
    softcap,
    window,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The running softmax over tokens from `begin` (a multiple of TOKENS) to `end`."""
    dims, tokens = tl.arange(0, DIM_PAD), tl.arange(0, TOKENS)
    for start in range(begin, end, TOKENS):
        at = start + tokens
        if MASKED:
            # Tokens past the window may have lost their block: they are not looked up.
            known = (at < end) & (at >= oldest)
            block = tl.load(table_ptr + at // BLOCK, mask=known, other=0)
            ok = known[:, None] & (dims < DIM)[None, :]
        else:
            block = tl.load(table_ptr + at // BLOCK)
            ok = (dims < DIM)[None, :]
        place = (block.to(tl.int64) * 2 * kv_heads) * (BLOCK * DIM) + at % BLOCK * DIM
        source = kv_ptr + place[:, None] + dims[None, :]
        if MASKED or DIM != DIM_PAD:
            k = tl.load(source, mask=ok, other=0.0)
            v = tl.load(source + kv_heads * BLOCK * DIM, mask=ok, other=0.0)
        else:
            k = tl.load(source)
            v = tl.load(source + kv_heads * BLOCK * DIM)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        if MASKED:
            seen = at[None, :] <= positions[:, None]
            if HAS_WINDOW:
                seen = seen & (at[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top * scale_log2
        if MASKED:
            # A row may see nothing of a tile: -inf less -inf would be NaN.
            base = tl.where(new_top == float("-inf"), 0.0, base)
        shrink = tl.exp2(top * scale_log2 - base)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _prefill_kernel(
    q_ptr,  # [rows, kv_heads * GROUP, DIM]
    kv_ptr,  # one layer: [blocks][2][kv_heads][BLOCK][DIM]
    tables_ptr,  # int32 [chunks, table_stride]
    first_rows_ptr,  # int32 [chunks + 1]
    lengths_ptr,  # int32 [chunks]
    out_ptr,  # like q
    chunks,
    table_stride,
    scale_log2,
    softcap,
    window,
    CHUNKS_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    head, kv_heads = tl.program_id(0), tl.num_programs(0)
    # The last tiles of a prompt see most: they start first, so that none is alone at the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    queries: tl.constexpr = ROWS // GROUP
    # Chunk c has the tiles from first_rows[c] // queries + c on: enough for all of its rows,
    # and found without a running sum. The last of them may have no rows.
    index = tl.arange(0, CHUNKS_PAD)
    base = tl.load(first_rows_ptr)
    starts = tl.load(first_rows_ptr + index, mask=index < chunks, other=0) - base
    before = (index < chunks) & (starts // queries + index <= tile)
    chunk = tl.sum(before.to(tl.int32), 0) - 1
    first = tl.load(first_rows_ptr + chunk)
    count = tl.load(first_rows_ptr + chunk + 1) - first
    skipped = (tile - (first - base) // queries - chunk) * queries
    if skipped >= count:
        return

    row, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    query = skipped + row // GROUP
    used = (row < queries * GROUP) & (query < count)
    last = tl.minimum(skipped + queries, count) - 1
    context = tl.load(lengths_ptr + chunk) - count
    positions = context + tl.minimum(query, last)
    slot = ((first + query).to(tl.int64) * kv_heads + head) * GROUP + row % GROUP
    q_ok = used[:, None] & (dims < DIM)[None, :]
    q = tl.load(q_ptr + slot[:, None] * DIM + dims[None, :], mask=q_ok, other=0.0)
    q = q.to(tl.float32) if WIDEN else q

    end = context + last + 1
    whole_end = (context + skipped + 1) // TOKENS * TOKENS
    oldest, whole_begin = 0, 0
    if HAS_WINDOW:
        oldest = tl.maximum(context + skipped - window + 1, 0)
        whole_begin = tl.cdiv(tl.maximum(end - window, 0), TOKENS) * TOKENS
        whole_begin = tl.minimum(whole_begin, tl.cdiv(end, TOKENS) * TOKENS)
        whole_end = tl.maximum(whole_begin, whole_end)
    table_ptr = tables_ptr + chunk.to(tl.int64) * table_stride
    head_ptr = kv_ptr + head * (BLOCK * DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    if HAS_WINDOW:
        top, total, acc = _attend(
            q, top, total, acc, positions, table_ptr, head_ptr,
            oldest // TOKENS * TOKENS, tl.minimum(whole_begin, end),
            oldest, kv_heads, scale_log2, softcap, window,
            DIM, DIM_PAD, BLOCK, TOKENS, True, True, HAS_SOFTCAP, WIDEN,
        )  # fmt: skip
    top, total, acc = _attend(
        q, top, total, acc, positions, table_ptr, head_ptr, whole_begin, whole_end,
        oldest, kv_heads, scale_log2, softcap, window,
        DIM, DIM_PAD, BLOCK, TOKENS, False, HAS_WINDOW, HAS_SOFTCAP, WIDEN,
    )  # fmt: skip
    top, total, acc = _attend(
        q, top, total, acc, positions, table_ptr, head_ptr, whole_end, end,
        oldest, kv_heads, scale_log2, softcap, window,
        DIM, DIM_PAD, BLOCK, TOKENS, True, HAS_WINDOW, HAS_SOFTCAP, WIDEN,
    )  # fmt: skip
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + slot[:, None] * DIM + dims[None, :], result, mask=q_ok)


class PrefillAttention:
    """Launches attention of prompt chunks. `tiling`: what all calls take; None: chosen by size."""

    def __init__(self, layout: GpuKvLayout, query_heads: int) -> None:
        group, remainder = divmod(query_heads, layout.kv_heads)
        if remainder or not 1 <= group <= MAX_GROUP:
            raise ValueError(f"query_heads must be 1 to {MAX_GROUP} times kv_heads")
        self.layout = layout
        self.query_heads = query_heads
        self.tiling: Tiling | None = None
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
        `first_rows[c + 1]`, none if they are equal. longest: about how many rows the longest chunk
        has, by which the tiling is chosen. window: tokens seen, the query included; 0 means all.
        softcap: scores become cap * tanh(score / cap).
        """
        layout, chunks, rows = self.layout, lengths.shape[0], q.shape[0]
        check("q", q, (-1, self.query_heads, layout.head_dim), *FLOATS)
        check("out", out, q.shape, q.dtype)
        check("layer_kv", layer_kv, layout.shape[1:], q.dtype)
        check("block_tables", block_tables, (chunks, -1), torch.int32)
        check("lengths", lengths, (chunks,), torch.int32)
        check("first_rows", first_rows, (chunks + 1,), torch.int32)
        if scale <= 0:
            raise ValueError(f"scale must be more than 0, not {scale}")
        if not chunks:
            return
        tiling = self.tiling or choose_tiling(longest, layout.head_dim, q.dtype)
        grid = (layout.kv_heads, rows // (tiling.rows // self._group) + chunks)
        _prefill_kernel[grid](
            q,
            layer_kv,
            block_tables,
            first_rows,
            lengths,
            out,
            chunks,
            block_tables.stride(0),
            scale * LOG2_E,
            softcap / scale,
            window,
            CHUNKS_PAD=triton.next_power_of_2(chunks),
            GROUP=self._group,
            DIM=layout.head_dim,
            DIM_PAD=triton.next_power_of_2(layout.head_dim),
            BLOCK=layout.block_tokens,
            ROWS=tiling.rows,
            TOKENS=tiling.tokens,
            HAS_WINDOW=window > 0,
            HAS_SOFTCAP=softcap > 0,
            WIDEN=INTERPRET,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )


def choose_tiling(longest: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """Small sweeps need programs more than large tiles; wide heads lack registers for those."""
    if dtype == torch.float32:
        return Tiling(rows=32, tokens=32, warps=4, stages=2)
    if head_dim > 128:
        return Tiling(rows=64, tokens=32, warps=4, stages=2)
    if longest <= 512:
        return Tiling(rows=64, tokens=64, warps=4, stages=3)
    return Tiling(rows=128, tokens=64, warps=8, stages=3)
