"""What the sampler does with all logits of a batch.

_best_kernel   (row, tile): penalties and edits; the tile's largest logit and where it stands
_draw_kernel   (row): the largest of all, or a draw
_top_kernel    (row, tile): what the log probabilities need of a tile
_logprob_kernel  (row): puts the tiles together
"""

from __future__ import annotations

import triton
import triton.language as tl

PROMPT = 1
"""Set in a history entry of a token that the prompt has; outputs count above it."""
OUTPUT = 2
"""Added to a history entry for each time that the output has the token..."""
MOST_OUTPUTS = 16_382
"""... up to as many as fit into 16 bits, long past what a penalty can make any difference to."""


@triton.jit
def _penalised(
    x, at, ok, row, slot, position, numbers_ptr, history_ptr, recent_ptr, max_rows, VOCAB
):
    """Logits after repetition, frequency and presence penalties, as gpu_service.model.adjust."""
    entry = history_ptr + slot.to(tl.int64) * VOCAB + at
    seen = tl.load(entry, mask=ok, other=0).to(tl.int32)
    # The token before this one is counted once its row comes back: a sweep that is repeated draws
    # anew, and must not count twice.
    last = tl.load(recent_ptr + 2 * slot)
    is_next = tl.load(recent_ptr + 2 * slot + 1) == position - 1
    count = (seen >> 1) + ((at == last) & is_next).to(tl.int32)
    repetition = tl.load(numbers_ptr + row)
    frequency = tl.load(numbers_ptr + max_rows + row)
    presence = tl.load(numbers_ptr + 2 * max_rows + row)
    changed = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    lowered = frequency.to(tl.float64) * count.to(tl.float64) + tl.where(count > 0, presence, 0.0)
    return tl.where((seen > 0) | (count > 0), changed - lowered.to(tl.float32), x)


@triton.jit
def _best_kernel(
    logits_ptr,  # [rows, VOCAB]
    places_ptr,  # int32 [rows]: which of the logits' rows it is; all of them unless ADJUST
    work_ptr,  # fp32 [rows, VOCAB], written for rows with a temperature
    best_ptr,  # fp32 [rows, tiles]; +inf where a logit is NaN or +inf
    where_ptr,  # int32 [rows, tiles]
    numbers_ptr,  # fp32 [5, max_rows]: repetition, frequency, presence, temperature, floor
    positions_ptr,  # int32 [rows]
    slots_ptr,  # int32 [rows]; -1: no penalties
    history_ptr,  # int16 [slots, VOCAB]
    recent_ptr,  # int32 [slots, 2]: the last token drawn, and its position
    first_edits_ptr,  # int32 [rows + 1]
    edit_pairs_ptr,  # int32 [edits, 2]: the token, and the bits of an fp32
    max_rows,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    ADJUST: tl.constexpr,
):
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    at = tile * TILE + tl.arange(0, TILE)
    ok = at < VOCAB
    place = tl.load(places_ptr + row) if ADJUST else row
    x = tl.load(logits_ptr + place.to(tl.int64) * VOCAB + at, mask=ok, other=float("-inf"))
    x = x.to(tl.float32)
    if ADJUST:
        slot, position = tl.load(slots_ptr + row), tl.load(positions_ptr + row)
        if slot >= 0:
            x = _penalised(
                x,
                at,
                ok,
                row,
                slot,
                position,
                numbers_ptr,
                history_ptr,
                recent_ptr,
                max_rows,
                VOCAB,
            )
        for edit in range(tl.load(first_edits_ptr + row), tl.load(first_edits_ptr + row + 1)):
            token = tl.load(edit_pairs_ptr + 2 * edit)
            value = tl.load(edit_pairs_ptr + 2 * edit + 1).to(tl.float32, bitcast=True)
            edited = tl.where(value == float("-inf"), value, x + value)
            x = tl.where(at == token, edited, x)
        if tl.load(numbers_ptr + 3 * max_rows + row) > 0:
            tl.store(work_ptr + row.to(tl.int64) * VOCAB + at, x, mask=ok)
    best, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    broken = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0) > 0
    tl.store(best_ptr + row * tiles + tile, tl.where(broken, float("inf"), best))
    tl.store(where_ptr + row * tiles + tile, tile * TILE + index)


@triton.jit
def _exp(x):
    """exp to 2 units in the last place: x * log2(e) rounded once loses digits of large x."""
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.4426950408889634, -high) + x * 1.925963033500e-8
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@triton.jit
def _threshold(j):
    """Values relative to the best one, descending; below the last a weight is 0 in fp32."""
    high = tl.where(j == 0, -1.0, tl.where(j == 1, -2.0, tl.where(j == 2, -3.5, -5.0)))
    low = tl.where(j == 4, -7.0, tl.where(j == 5, -10.0, tl.where(j == 6, -15.0, -150.0)))
    return tl.where(j < 4, high, low)


@triton.jit
def _best(best_ptr, row, tiles, TILES_PAD: tl.constexpr):
    """A row's largest logit, and whether a token can be chosen by it."""
    tile = tl.arange(0, TILES_PAD)
    best = tl.max(tl.load(best_ptr + row * tiles + tile, mask=tile < tiles, other=-float("inf")), 0)
    return best, (best > float("-inf")) & (best < float("inf"))


@triton.jit
def _is_filtered(top_k, top_p, min_floor, VOCAB: tl.constexpr):
    return ((top_k > 0) & (top_k < VOCAB)) | (top_p < 1) | (min_floor > float("-inf"))


@triton.jit
def _weigh_kernel(
    work_ptr,  # fp32 [rows, VOCAB]: adjusted logits; afterwards relative to the best, over T
    best_ptr,
    numbers_ptr,
    top_ps_ptr,  # fp64 [rows]
    top_ks_ptr,  # int32 [rows]
    sums_ptr,  # fp64 [rows, tiles]: weights
    counts_ptr,  # int32 [rows, tiles, 8]: values of at least each threshold
    masses_ptr,  # fp32 [rows, tiles, 8]: their weights
    max_rows,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PAD: tl.constexpr,
):
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    temperature = tl.load(numbers_ptr + 3 * max_rows + row)
    best, usable = _best(best_ptr, row, tiles, TILES_PAD)
    if (temperature <= 0) | (usable == 0):
        return
    at = tile * TILE + tl.arange(0, TILE)
    ok = at < VOCAB
    place = work_ptr + row.to(tl.int64) * VOCAB + at
    x = tl.load(place, mask=ok, other=float("-inf"))
    # -inf would give NaN where digits are split off.
    x = tl.maximum(tl.div_rn(x - best, temperature), -200.0)
    tl.store(place, x, mask=ok)
    weights = _exp(x)
    # fp64: in fp32 the sum over a large vocabulary loses its small terms.
    tl.store(sums_ptr + row * tiles + tile, tl.sum(weights.to(tl.float64), 0))
    top_k, top_p = tl.load(top_ks_ptr + row), tl.load(top_ps_ptr + row)
    min_floor = tl.load(numbers_ptr + 4 * max_rows + row)
    if _is_filtered(top_k, top_p, min_floor, VOCAB):
        j = tl.arange(0, 8)
        above = x[None, :] >= _threshold(j)[:, None]
        out = (row * tiles + tile) * 8 + j
        tl.store(counts_ptr + out, tl.sum(above.to(tl.int32), 1))
        tl.store(masses_ptr + out, tl.sum(tl.where(above, weights[None, :], 0.0), 1))


@triton.jit
def _choose(
    counts_ptr, masses_ptr, row, tiles, total, top_k, top_p, min_floor,
    VOCAB: tl.constexpr, TILES_PAD: tl.constexpr,
):  # fmt: skip
    """Which threshold is the highest that leaves all that may be drawn; the counts above it of each
    tile. With top-k and top-p both, the first has to be known whole for the second."""
    tile, j = tl.arange(0, TILES_PAD), tl.arange(0, 8)
    place = (row * tiles + tile)[:, None] * 8 + j[None, :]
    known = (tile < tiles)[:, None] & (j >= 0)[None, :]
    counts = tl.load(counts_ptr + place, mask=known, other=0)
    masses = tl.load(masses_ptr + place, mask=known, other=0.0)
    if (top_k > 0) & (top_k < VOCAB):
        enough = tl.sum(counts, 0) >= top_k
    elif top_p < 1:
        enough = tl.sum(masses.to(tl.float64), 0) >= top_p * total
    else:
        enough = _threshold(j) <= min_floor
    chosen = tl.min(tl.where(enough, j, 7), 0)
    return chosen, tl.sum(tl.where(j[None, :] == chosen, counts, 0), 1)


@triton.jit
def _total(sums_ptr, row, tiles, TILES_PAD: tl.constexpr):
    tile = tl.arange(0, TILES_PAD)
    return tl.sum(tl.load(sums_ptr + row * tiles + tile, mask=tile < tiles, other=0.0), 0)


@triton.jit
def _gather_kernel(
    work_ptr,
    values_ptr,  # fp32 [rows, ROOM]
    ids_ptr,  # int32 [rows, ROOM]
    best_ptr,
    numbers_ptr,
    top_ps_ptr,
    top_ks_ptr,
    sums_ptr,
    counts_ptr,
    masses_ptr,
    max_rows,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PAD: tl.constexpr,
    ROOM: tl.constexpr,
):
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    top_k, top_p = tl.load(top_ks_ptr + row), tl.load(top_ps_ptr + row)
    min_floor = tl.load(numbers_ptr + 4 * max_rows + row)
    is_drawn = tl.load(numbers_ptr + 3 * max_rows + row) > 0
    _, usable = _best(best_ptr, row, tiles, TILES_PAD)
    if (is_drawn & usable & _is_filtered(top_k, top_p, min_floor, VOCAB)) == 0:
        return
    total = _total(sums_ptr, row, tiles, TILES_PAD)
    chosen, counts = _choose(
        counts_ptr, masses_ptr, row, tiles, total, top_k, top_p, min_floor, VOCAB, TILES_PAD
    )
    if tl.sum(counts, 0) > ROOM:
        return
    first = tl.sum(tl.where(tl.arange(0, TILES_PAD) < tile, counts, 0), 0)
    at = tile * TILE + tl.arange(0, TILE)
    x = tl.load(work_ptr + row.to(tl.int64) * VOCAB + at, mask=at < VOCAB, other=-200.0)
    kept = x >= _threshold(chosen)
    place = row * ROOM + first + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(values_ptr + place, x, mask=kept)
    tl.store(ids_ptr + place, at, mask=kept)
