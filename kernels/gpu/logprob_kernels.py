"""Log probabilities of drawn tokens and the best ones beside them.

_top_kernel      (row, tile): the tile's best tokens, its sum, how many exceed the drawn one
_logprob_kernel  (row): puts the tiles together
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.sampling_kernels import _exp


@triton.jit
def _top_kernel(
    logits_ptr,
    places_ptr,  # int32 [rows]: which of the logits' and tokens' rows it is
    tokens_ptr,  # int64, -1: none
    tops_ptr,  # int32 [rows]; -1: no log probabilities
    top_values_ptr,  # fp32 [rows, tiles, MOST]
    top_ids_ptr,  # int32 [rows, tiles, MOST]
    sums_ptr,  # fp32 [rows, tiles, 2]: the largest, and the sum relative to it
    ranks_ptr,  # int32 [rows, tiles]: how many exceed the chosen one
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    MOST: tl.constexpr,
):
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    source = tl.load(places_ptr + row)
    top, token = tl.minimum(tl.load(tops_ptr + row), MOST), tl.load(tokens_ptr + source)
    if (top < 0) | (token < 0):
        return
    at = tile * TILE + tl.arange(0, TILE)
    logits_ptr += source.to(tl.int64) * VOCAB
    x = tl.load(logits_ptr + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
    chosen = tl.load(logits_ptr + token).to(tl.float32)
    largest = tl.max(x, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    place = row * tiles + tile
    tl.store(sums_ptr + 2 * place, largest)
    tl.store(sums_ptr + 2 * place + 1, tl.sum(_exp(tl.maximum(x - base, -200.0)), 0))
    tl.store(ranks_ptr + place, tl.sum((x > chosen).to(tl.int32), 0))
    for n in range(0, top):
        best, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(top_values_ptr + place * MOST + n, best)
        tl.store(top_ids_ptr + place * MOST + n, tile * TILE + index)
        x = tl.where(at == tile * TILE + index, float("-inf"), x)


@triton.jit
def _logprob_kernel(
    logits_ptr,
    places_ptr,
    tokens_ptr,
    tops_ptr,
    top_values_ptr,
    top_ids_ptr,
    sums_ptr,
    ranks_ptr,
    logprob_ptr,  # fp32 [rows]
    rank_ptr,  # int32 [rows]
    ids_ptr,  # int32 [rows, MOST]
    values_ptr,  # fp32 [rows, MOST]
    tiles,
    VOCAB: tl.constexpr,
    TILES_PAD: tl.constexpr,
    MOST: tl.constexpr,
    MOST_PAD: tl.constexpr,
):
    row = tl.program_id(0)
    source = tl.load(places_ptr + row)
    top, token = tl.minimum(tl.load(tops_ptr + row), MOST), tl.load(tokens_ptr + source)
    if (top < 0) | (token < 0):
        return
    tile = tl.arange(0, TILES_PAD)
    ok = tile < tiles
    sums = sums_ptr + 2 * (row * tiles + tile)
    largest = tl.load(sums, mask=ok, other=float("-inf"))
    best = tl.max(largest, 0)
    share = tl.load(sums + 1, mask=ok, other=0.0) * _exp(tl.maximum(largest - best, -200.0))
    total = best + tl.log(tl.sum(share, 0))
    chosen = tl.load(logits_ptr + source.to(tl.int64) * VOCAB + token).to(tl.float32)
    tl.store(logprob_ptr + row, chosen - total)
    rank = tl.sum(tl.load(ranks_ptr + row * tiles + tile, mask=ok, other=0), 0)
    tl.store(rank_ptr + row, rank + 1)

    n = tl.arange(0, MOST_PAD)
    listed = (row * tiles + tile)[:, None] * MOST + n[None, :]
    known = ok[:, None] & (n < top)[None, :]
    x = tl.load(top_values_ptr + listed, mask=known, other=float("-inf"))
    ids = tl.load(top_ids_ptr + listed, mask=known, other=VOCAB)
    for i in range(0, top):
        value = tl.max(tl.max(x, 1), 0)
        index = tl.min(tl.min(tl.where(x == value, ids, VOCAB), 1), 0)
        tl.store(ids_ptr + row * MOST + i, index)
        tl.store(values_ptr + row * MOST + i, value - total)
        x = tl.where(ids == index, float("-inf"), x)
