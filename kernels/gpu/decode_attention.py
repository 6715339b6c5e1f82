"""Paged decode attention, split over the KV length (flash-decoding, arXiv 2311.01282).

    program (row, KV head, split): all query heads of the group against its share of the tokens
    merge   (row, query head):     the splits' partial results, weighted by their log-sum-exp

The query heads that share a KV head are the rows of one `tl.dot` (padded to 16), so each K and V
element is read once. The floor is bytes: KV bytes / memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.tensors import FLOATS, INTERPRET, check

MAX_GROUP = 16
LOG2_E = 1.4426950408889634


@triton.jit
def _scores(q, k, seen, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw scores of a tile; with a cap, capped (softcap is cap / scale, see the wrapper)."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_SOFTCAP:
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
    return tl.where(seen[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=["staging_shift"])
def _split_kernel(
    q_ptr,  # [rows, kv_heads * GROUP, DIM]
    kv_ptr,  # one layer: [blocks][2][kv_heads][BLOCK][DIM]
    tables_ptr,  # int32 [rows, table_stride]
    lengths_ptr,  # int32 [rows]; 0 marks a padding row
    part_ptr,  # fp32 [rows, kv_heads, splits, GROUP, DIM]
    lse_ptr,  # fp32 [rows, kv_heads, splits, GROUP], base 2
    table_stride, scale_log2, softcap, window, staging_shift,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, STAGED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(lengths_ptr + row)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    share = tl.cdiv(tl.cdiv(length, TILE) - first // TILE, splits)
    begin = first // TILE + split * share
    end = tl.minimum(begin + share, tl.cdiv(length, TILE))

    group, dims, tokens = tl.arange(0, 16), tl.arange(0, DIM_PAD), tl.arange(0, TILE)
    dim_ok = dims < DIM
    slot = (row * kv_heads + head) * GROUP + group
    q_ok = (group < GROUP)[:, None] & dim_ok[None, :]
    q = tl.load(q_ptr + slot[:, None] * DIM + dims[None, :], mask=q_ok, other=0.0)
    q = q.to(tl.float32) if WIDEN else q
    top = tl.full([16], float("-inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, DIM_PAD], tl.float32)
    for tile in range(begin, end):
        at = tile * TILE + tokens
        seen = (at < length) & (at >= first)
        block = tl.load(tables_ptr + row * table_stride + at // BLOCK, mask=seen, other=0)
        if STAGED:
            block += tl.where(block >= STAGED, staging_shift, 0)
        place = (block.to(tl.int64) * 2 * kv_heads + head) * (BLOCK * DIM) + at % BLOCK * DIM
        ok = seen[:, None] & dim_ok[None, :]
        source = kv_ptr + place[:, None] + dims[None, :]
        k = tl.load(source, mask=ok, other=0.0)
        v = tl.load(source + kv_heads * BLOCK * DIM, mask=ok, other=0.0)
        scores = _scores(q, k.to(tl.float32) if WIDEN else k, seen, softcap, HAS_SOFTCAP)
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A tile may lie wholly outside of the window: -inf less -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top) * scale_log2
        # One fused multiply-add: rounding the scaled score by itself costs digits when it is large.
        shrink = tl.exp2(top * scale_log2 - base)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v = v.to(tl.float32) if WIDEN else v
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top

    slot = ((row * kv_heads + head) * splits + split) * GROUP + group
    tl.store(lse_ptr + slot, top * scale_log2 + tl.log2(total), mask=group < GROUP)
    tl.store(part_ptr + slot[:, None] * DIM + dims[None, :], acc / total[:, None], mask=q_ok)


@triton.jit
def _merge_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,  # [rows, query_heads, DIM]
    out_lse_ptr,  # fp32 [rows, query_heads], natural logarithm
    splits,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    row, query_head = tl.program_id(0), tl.program_id(1)
    query_heads = tl.num_programs(1)
    head, group = query_head // GROUP, query_head % GROUP
    index = tl.arange(0, SPLITS_PAD)
    dims = tl.arange(0, DIM_PAD)
    slot = ((row * (query_heads // GROUP) + head) * splits + index) * GROUP + group
    lse = tl.load(lse_ptr + slot, mask=index < splits, other=float("-inf"))
    # Empty splits wrote -inf and 0 / 0: their partial results are not looked at.
    used = lse > float("-inf")
    nothing = tl.max(lse, 0) == float("-inf")
    broken = tl.sum((lse != lse).to(tl.int32), 0) > 0
    top = tl.where(nothing, 0.0, tl.max(lse, 0))
    weight = tl.where(used, tl.exp2(lse - top), 0.0)
    total = tl.sum(weight, 0)
    mask = used[:, None] & (dims < DIM)[None, :]
    part = tl.load(part_ptr + slot[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(nothing, 1.0, total)
    out = tl.where(broken, float("nan"), out)
    place = row * query_heads + query_head
    tl.store(out_ptr + place * DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < DIM)
    if HAS_LSE:
        tl.store(out_lse_ptr + place, (top + tl.log2(total)) * 0.6931471805599453)


def merge_splits(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    out: torch.Tensor,
    splits: int,
    group: int,
    lse: torch.Tensor | None = None,
) -> None:
    """Fill `out` `[rows, query_heads, head_dim]` from partial results.

    part: fp32, its memory begins with `[rows, kv_heads, splits, group, head_dim]`. part_lse: fp32,
    likewise, base 2; -inf for a split that saw nothing. lse: fp32 `[rows, query_heads]`, filled
    with natural log-sum-exps.
    """
    rows, query_heads, dim = out.shape
    _merge_kernel[(rows, query_heads)](
        part,
        part_lse,
        out,
        out if lse is None else lse,
        splits,
        GROUP=group,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        SPLITS_PAD=triton.next_power_of_2(splits),
        HAS_LSE=lse is not None,
        num_warps=1,
    )


class DecodeAttention:
    """Launches decode attention for up to `max_rows` rows; owns the workspace of partial results.

    splits: how many programs share one (row, KV head). Fixed per object, since a CUDA graph fixes
    its grid: make one per captured batch size, with `choose_splits`.
    """

    def __init__(
        self,
        layout: GpuKvLayout,
        query_heads: int,
        max_rows: int,
        splits: int,
        device: torch.device | str,
    ) -> None:
        group, remainder = divmod(query_heads, layout.kv_heads)
        if remainder or not 1 <= group <= MAX_GROUP:
            raise ValueError(f"query_heads must be 1 to {MAX_GROUP} times kv_heads")
        if not 1 <= splits <= 128:
            raise ValueError(f"splits must be 1 to 128, not {splits}")
        self.layout = layout
        self.query_heads = query_heads
        self.splits = splits
        # docs/perf-log.md, "GPU kernels": 32 tokens and 2 stages were best or level from 26k to
        # 280k tokens in the batch; wide heads have registers for 16 only.
        self.tile = 32 if layout.head_dim <= 128 else 16
        self.warps = 4
        self.stages = 2
        self._group = group
        shape = (max_rows, layout.kv_heads, splits, group)
        self._part = torch.empty((*shape, layout.head_dim), dtype=torch.float32, device=device)
        self._lse = torch.empty(shape, dtype=torch.float32, device=device)

    def __call__(
        self,
        q: torch.Tensor,
        layer_kv: torch.Tensor,
        block_tables: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        lse: torch.Tensor | None = None,
        layer: int = 0,
    ) -> None:
        """Fill `out` `[rows, query_heads, head_dim]`; rows of length 0 become 0.

        q: like `out`. layer_kv: one layer of the cache, the new token's K and V in place; `layer`:
        which one, where tables name staging.
        block_tables: int32 `[rows, width]`. lengths: int32 `[rows]`. window: tokens seen, the query
        included; 0 means all. softcap: scores become cap * tanh(score / cap). lse: fp32
        `[rows, query_heads]`, natural log-sum-exp; -inf for rows of length 0.
        """
        self._check(q, layer_kv, block_tables, lengths, out, lse)
        layout, rows = self.layout, q.shape[0]
        if scale <= 0:
            raise ValueError(f"scale must be more than 0, not {scale}")
        padded = triton.next_power_of_2(layout.head_dim)
        _split_kernel[(rows, layout.kv_heads, self.splits)](
            q,
            layer_kv,
            block_tables,
            lengths,
            self._part,
            self._lse,
            block_tables.stride(0),
            scale * LOG2_E,
            softcap / scale,
            window,
            layout.staging_shift(layer),
            GROUP=self._group,
            DIM=layout.head_dim,
            DIM_PAD=padded,
            BLOCK=layout.block_tokens,
            TILE=self.tile,
            STAGED=layout.staged_from,
            HAS_SOFTCAP=softcap > 0,
            WIDEN=INTERPRET,
            num_warps=self.warps,
            num_stages=self.stages,
        )
        merge_splits(self._part, self._lse, out, self.splits, self._group, lse)

    def _check(
        self,
        q: torch.Tensor,
        layer_kv: torch.Tensor,
        block_tables: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        layout, rows = self.layout, q.shape[0]
        check("q", q, (rows, self.query_heads, layout.head_dim), *FLOATS)
        check("out", out, q.shape, q.dtype)
        check("layer_kv", layer_kv, layout.shape[1:], q.dtype)
        check("block_tables", block_tables, (rows, -1), torch.int32)
        check("lengths", lengths, (rows,), torch.int32)
        if rows > self._lse.shape[0]:
            raise ValueError(f"{rows} rows are more than the {self._lse.shape[0]} prepared for")
        if lse is not None:
            check("lse", lse, (rows, self.query_heads), torch.float32)


def choose_splits(rows: int, kv_heads: int, multiprocessors: int) -> int:
    """Enough programs for about four on each multiprocessor, at most 32 a row."""
    return max(1, min(32, -(-4 * multiprocessors // max(1, rows * kv_heads))))
