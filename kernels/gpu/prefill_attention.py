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

from kernels.gpu.decode_attention import LOG2_E, MAX_GROUP, merge_splits
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.tensors import FLOATS, INTERPRET, check

_SPLIT_ROWS = 1024
"""Rows times splits that the workspace holds."""
_MAX_SPLITS = 8


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
    q, top, total, acc, positions, table_ptr, kv_ptr, begin, end, oldest, kv_heads,
    scale_log2, softcap, window, staging_shift,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
    STAGED: tl.constexpr,
):  # fmt: skip
    """The running softmax over tokens from `begin` (a multiple of TOKENS) to `end`. positions
    [ROWS]: of the rows' queries. kv_ptr: the first element of this head's K in block 0."""
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
        if STAGED:
            block += tl.where(block >= STAGED, staging_shift, 0)
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
def _find_tile(first_rows_ptr, chunks, tile, QUERIES: tl.constexpr, CHUNKS_PAD: tl.constexpr):
    """(chunk, its first row, its rows, those before the tile) of a tile of QUERIES tokens.

    Chunk c has the tiles from first_rows[c] // QUERIES + c on: enough for all of its rows, and
    found without a running sum. The last of them may have no rows."""
    index = tl.arange(0, CHUNKS_PAD)
    base = tl.load(first_rows_ptr)
    starts = tl.load(first_rows_ptr + index, mask=index < chunks, other=0) - base
    before = (index < chunks) & (starts // QUERIES + index <= tile)
    chunk = tl.sum(before.to(tl.int32), 0) - 1
    first = tl.load(first_rows_ptr + chunk)
    count = tl.load(first_rows_ptr + chunk + 1) - first
    return chunk, first, count, (tile - (first - base) // QUERIES - chunk) * QUERIES


@triton.jit
def _share(oldest, end, split, splits, TOKENS: tl.constexpr):
    """The part of the tokens from `oldest` to `end` that one of `splits` programs takes; both ends
    multiples of TOKENS."""
    begin = oldest // TOKENS
    share = tl.cdiv(tl.cdiv(end, TOKENS) - begin, splits)
    return (begin + split * share) * TOKENS, (begin + (split + 1) * share) * TOKENS


@triton.jit
def _bounds(first, end, window, TOKENS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Of a tile whose queries stand from `first` to `end`: the oldest token that one of them sees,
    and where the tokens begin and end that all of them do (multiples of TOKENS)."""
    oldest, whole_begin = 0, 0
    whole_end = (first + 1) // TOKENS * TOKENS
    if HAS_WINDOW:
        oldest = tl.maximum(first - window + 1, 0)
        whole_begin = tl.cdiv(tl.maximum(end - window, 0), TOKENS) * TOKENS
        whole_begin = tl.minimum(whole_begin, tl.cdiv(end, TOKENS) * TOKENS)
        whole_end = tl.maximum(whole_begin, whole_end)
    return oldest, whole_begin, whole_end


@triton.jit(do_not_specialize=["staging_shift"])
def _prefill_kernel(
    q_ptr, kv_ptr, tables_ptr, first_rows_ptr, lengths_ptr, out_ptr, part_ptr, lse_ptr,
    chunks, table_stride, scale_log2, softcap, window, staging_shift,
    CHUNKS_PAD: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
    STAGED: tl.constexpr,
):  # fmt: skip
    # The last tiles of a prompt see most: they start first, so that none is alone at the end.
    head, kv_heads, tile = tl.program_id(0), tl.num_programs(0), tl.num_programs(1) - 1
    tile -= tl.program_id(1)
    queries: tl.constexpr = ROWS // GROUP
    chunk, first, count, skipped = _find_tile(first_rows_ptr, chunks, tile, queries, CHUNKS_PAD)
    if skipped >= count:
        return
    row, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    query, last = skipped + row // GROUP, tl.minimum(skipped + queries, count) - 1
    context = tl.load(lengths_ptr + chunk) - count
    positions = context + tl.minimum(query, last)
    place = (first + query).to(tl.int64) * kv_heads + head
    used = (row < queries * GROUP) & (query < count)
    q_ok = used[:, None] & (dims < DIM)[None, :]
    slot = place * GROUP + row % GROUP
    q = tl.load(q_ptr + slot[:, None] * DIM + dims[None, :], mask=q_ok, other=0.0)
    q = q.to(tl.float32) if WIDEN else q
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    end = context + last + 1
    oldest, whole_begin, whole_end = _bounds(context + skipped, end, window, TOKENS, HAS_WINDOW)
    low, high = _share(oldest, end, tl.program_id(2), SPLITS, TOKENS)
    table_ptr = tables_ptr + chunk.to(tl.int64) * table_stride
    head_ptr = kv_ptr + head * BLOCK * DIM
    if HAS_WINDOW:
        top, total, acc = _attend(
            q, top, total, acc, positions, table_ptr, head_ptr,
            low, tl.minimum(tl.minimum(whole_begin, end), high),
            oldest, kv_heads, scale_log2, softcap, window, staging_shift,
            DIM, DIM_PAD, BLOCK, TOKENS, True, True, HAS_SOFTCAP, WIDEN, STAGED,
        )  # fmt: skip
    top, total, acc = _attend(
        q, top, total, acc, positions, table_ptr, head_ptr,
        tl.maximum(whole_begin, low), tl.minimum(whole_end, high),
        oldest, kv_heads, scale_log2, softcap, window, staging_shift,
        DIM, DIM_PAD, BLOCK, TOKENS, False, HAS_WINDOW, HAS_SOFTCAP, WIDEN, STAGED,
    )  # fmt: skip
    top, total, acc = _attend(
        q, top, total, acc, positions, table_ptr, head_ptr,
        tl.maximum(whole_end, low), tl.minimum(end, high),
        oldest, kv_heads, scale_log2, softcap, window, staging_shift,
        DIM, DIM_PAD, BLOCK, TOKENS, True, HAS_WINDOW, HAS_SOFTCAP, WIDEN, STAGED,
    )  # fmt: skip
    result = acc / total[:, None]
    if SPLITS == 1:
        target = out_ptr + slot[:, None] * DIM + dims[None, :]
        tl.store(target, result.to(out_ptr.dtype.element_ty), mask=q_ok)
    else:
        slot = (place * SPLITS + tl.program_id(2)) * GROUP + row % GROUP
        tl.store(part_ptr + slot[:, None] * DIM + dims[None, :], result, mask=q_ok)
        tl.store(lse_ptr + slot, top * scale_log2 + tl.log2(total), mask=used)


class PrefillAttention:
    """Launches attention of prompt chunks; owns the workspace of partial results.

    `tiling`, `splits`: what all calls take; None chooses by size. Splits share the context of a
    tile, for sweeps too small to fill the device: a CUDA graph fixes them.
    """

    def __init__(
        self,
        layout: GpuKvLayout,
        query_heads: int,
        device: torch.device | str,
        multiprocessors: int = 1,
    ) -> None:
        group, remainder = divmod(query_heads, layout.kv_heads)
        if remainder or not 1 <= group <= MAX_GROUP:
            raise ValueError(f"query_heads must be 1 to {MAX_GROUP} times kv_heads")
        self.layout = layout
        self.query_heads = query_heads
        self.tiling: Tiling | None = None
        self.splits: int | None = None
        self._group = group
        self._multiprocessors = multiprocessors
        shape = (_SPLIT_ROWS, query_heads)
        self._part = torch.zeros((*shape, layout.head_dim), dtype=torch.float32, device=device)
        self._lse = torch.zeros(shape, dtype=torch.float32, device=device)

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
        layer: int = 0,
    ) -> None:
        """Fill the chunks' rows of `out` `[rows, query_heads, head_dim]`; others hold anything.

        q: like `out`. layer_kv: one layer of the cache, the chunks' own K and V in place; `layer`:
        which one, where tables name staging.
        block_tables: int32 `[chunks, width]`. lengths: int32 `[chunks]`, tokens up to the chunk's
        end. first_rows: int32 `[chunks + 1]`: chunk c has the rows of q from `first_rows[c]` to
        `first_rows[c + 1]`, none if they are equal. longest: about how many rows the longest chunk
        has, by which the tiling is chosen. window: tokens seen, the query included; 0 means all.
        softcap: scores become cap * tanh(score / cap).
        """
        self._check(q, layer_kv, block_tables, lengths, first_rows, out)
        layout, chunks, rows = self.layout, lengths.shape[0], q.shape[0]
        if scale <= 0:
            raise ValueError(f"scale must be more than 0, not {scale}")
        if not chunks:
            return
        tiling = self.tiling or choose_tiling(longest, layout.head_dim, q.dtype)
        tiles = rows // (tiling.rows // self._group) + chunks
        splits = self._choose_splits(rows, tiling)
        padded = triton.next_power_of_2(layout.head_dim)
        _prefill_kernel[(layout.kv_heads, tiles, splits)](
            q, layer_kv, block_tables, first_rows, lengths, out, self._part, self._lse,
            chunks, block_tables.stride(0), scale * LOG2_E, softcap / scale, window,
            layout.staging_shift(layer),
            CHUNKS_PAD=triton.next_power_of_2(chunks), GROUP=self._group,
            DIM=layout.head_dim, DIM_PAD=padded, BLOCK=layout.block_tokens,
            ROWS=tiling.rows, TOKENS=tiling.tokens, SPLITS=splits,
            HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0, WIDEN=INTERPRET,
            STAGED=layout.staged_from,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        if splits > 1:
            merge_splits(self._part, self._lse, out, splits, self._group)

    def _choose_splits(self, rows: int, tiling: Tiling) -> int:
        """About two programs for each multiprocessor, as far as the workspace goes."""
        if self.splits is not None:
            return self.splits
        programs = max(1, rows * self._group // tiling.rows) * self.layout.kv_heads
        wanted = -(-2 * self._multiprocessors // programs)
        return max(1, min(_MAX_SPLITS, wanted, _SPLIT_ROWS // max(rows, 1)))

    def _check(
        self,
        q: torch.Tensor,
        layer_kv: torch.Tensor,
        block_tables: torch.Tensor,
        lengths: torch.Tensor,
        first_rows: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        chunks = lengths.shape[0]
        check("q", q, (-1, self.query_heads, self.layout.head_dim), *FLOATS)
        check("out", out, q.shape, q.dtype)
        check("layer_kv", layer_kv, self.layout.shape[1:], q.dtype)
        check("block_tables", block_tables, (chunks, -1), torch.int32)
        check("lengths", lengths, (chunks,), torch.int32)
        check("first_rows", first_rows, (chunks + 1,), torch.int32)


def choose_tiling(longest: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """docs/perf-log.md, "GPU kernels": 128 rows were never better, not even for long prompts."""
    if dtype == torch.float32:
        return Tiling(rows=32, tokens=32, warps=4, stages=2)
    if head_dim > 128:
        return Tiling(rows=64, tokens=32, warps=4, stages=2)
    if longest <= 512:
        return Tiling(rows=64, tokens=64, warps=4, stages=3)
    return Tiling(rows=64, tokens=64, warps=4, stages=2)
