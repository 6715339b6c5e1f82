"""The kernels of `kernels.gpu.sampling`.

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
"""Added to a history entry for each time that the output has the token."""


@triton.jit
def _penalised(
    x, at, ok, row, slot, position, numbers_ptr, history_ptr, recent_ptr, max_rows, VOCAB
):
    """Logits after repetition, frequency and presence penalties, as gpu_service.model.adjust."""
    entry = history_ptr + slot.to(tl.int64) * VOCAB + at
    seen = tl.load(entry, mask=ok, other=0)
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
    work_ptr,  # fp32 [rows, VOCAB], written for rows with a temperature
    best_ptr,  # fp32 [rows, tiles]; +inf where a logit is NaN or +inf
    where_ptr,  # int32 [rows, tiles]
    numbers_ptr,  # fp32 [5, max_rows]: repetition, frequency, presence, temperature, floor
    positions_ptr,  # int32 [rows]
    slots_ptr,  # int32 [rows]; -1: no penalties
    history_ptr,  # int32 [slots, VOCAB]
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
    x = tl.load(logits_ptr + row.to(tl.int64) * VOCAB + at, mask=ok, other=float("-inf"))
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
def _mix(z):
    """The finaliser of splitmix64, as gpu_service.model.draws."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _uniform(seed, position):
    """fp64 strictly between 0 and 1, 48 bits of (seed, position)."""
    counter = (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = _mix(_mix(seed.to(tl.uint64)) + counter) >> 16
    return (bits.to(tl.float64) + 0.5) * 3.552713678800501e-15  # 2 ** -48


@triton.jit
def _exp(x):
    """exp to 2 units in the last place: x * log2(e) rounded once loses digits of large x."""
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.4426950408889634, -high) + x * 1.925963033500e-8
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@triton.jit
def _mass(values_ptr, count, floor, CHUNK: tl.constexpr):
    """Sum of weights of values of at least `floor`, fp64."""
    lane = tl.arange(0, CHUNK)
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, count, CHUNK):
        x = tl.load(values_ptr + start + lane, mask=start + lane < count, other=-200.0)
        total += tl.sum(tl.where(x >= floor, _exp(x), 0.0).to(tl.float64), 0)
    return total


@triton.jit
def _compact(values_ptr, ids_ptr, count, floor, CHUNK: tl.constexpr):
    """Move values of at least `floor` to the front, in order; `ids` says where they stood."""
    lane = tl.arange(0, CHUNK)
    done = tl.full([], 0, tl.int32)
    for start in range(0, count, CHUNK):
        x = tl.load(values_ptr + start + lane, mask=start + lane < count, other=-200.0)
        kept = (x >= floor) & (start + lane < count)
        place = done + tl.cumsum(kept.to(tl.int32), 0) - 1
        # Nothing is written past what has been read: the scan waited for all of the chunk.
        tl.debug_barrier()
        tl.store(values_ptr + place, x, mask=kept)
        tl.store(ids_ptr + place, start + lane, mask=kept)
        done += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    return done


@triton.jit
def _search(
    values_ptr, ids_ptr, count, compacted, low, wanted, COUNTS: tl.constexpr, CHUNK: tl.constexpr
):
    """The largest value such that those of at least it weigh (or are) `wanted`; `low` if none is.

    The region [low, high) that holds it is cut in four by each pass, between the smallest and the
    largest value in it, until those are equal. Once few values are left above its lower end, the
    others are dropped.
    """
    lane = tl.arange(0, CHUNK)
    high = tl.full([], 1.0, tl.float32)
    # Most of what is kept lies within a few of the best value, which is 0.
    first = tl.full([], -16.0, tl.float32)
    second = tl.full([], -8.0, tl.float32)
    third = tl.full([], -4.0, tl.float32)
    floor = low
    searching = count > 0
    while searching:
        m1 = tl.full([], 0.0, tl.float64)
        m2 = tl.full([], 0.0, tl.float64)
        m3 = tl.full([], 0.0, tl.float64)
        smallest = tl.full([], float("inf"), tl.float32)
        largest = tl.full([], float("-inf"), tl.float32)
        above = tl.full([], 0, tl.int32)
        for start in range(0, count, CHUNK):
            x = tl.load(values_ptr + start + lane, mask=start + lane < count, other=-200.0)
            w = tl.where(x >= low, 1.0, 0.0) if COUNTS else _exp(x)
            m1 += tl.sum(tl.where(x >= first, w, 0.0).to(tl.float64), 0)
            m2 += tl.sum(tl.where(x >= second, w, 0.0).to(tl.float64), 0)
            m3 += tl.sum(tl.where(x >= third, w, 0.0).to(tl.float64), 0)
            inside = (x >= low) & (x < high)
            smallest = tl.minimum(smallest, tl.min(tl.where(inside, x, float("inf")), 0))
            largest = tl.maximum(largest, tl.max(tl.where(inside, x, float("-inf")), 0))
            above += tl.sum((x >= low).to(tl.int32), 0)
        if smallest >= largest:
            # One value is left, or none where rounding keeps the sum below the wanted one.
            floor = tl.minimum(smallest, low) if smallest > largest else smallest
            searching = False
        else:
            if (compacted == 0) & (above <= CHUNK) & (count > CHUNK):
                count = _compact(values_ptr, ids_ptr, count, low, CHUNK)
                compacted = 1
            if m3 >= wanted:
                low = third
            elif m2 >= wanted:
                low, high = second, third
            elif m1 >= wanted:
                low, high = first, second
            else:
                high = first
            from_, to = tl.maximum(low, smallest), tl.minimum(high, largest)
            second = from_ + (to - from_) * 0.5
            first = from_ + (second - from_) * 0.5
            third = second + (to - second) * 0.5
            # Between neighbours there is nothing: the upper one then stands alone.
            second = tl.where(second <= from_, to, second)
            first = tl.where(first <= from_, second, first)
            third = tl.where(third <= from_, to, third)
    return floor, count, compacted


@triton.jit
def _pick(values_ptr, count, floor, target, CHUNK: tl.constexpr):
    """Index of the first value whose running weight exceeds `target`."""
    lane = tl.arange(0, CHUNK)
    running = tl.full([], 0.0, tl.float64)
    start = tl.full([], 0, tl.int32)
    found = tl.full([], -1, tl.int32)
    while (start < count) & (found < 0):
        x = tl.load(values_ptr + start + lane, mask=start + lane < count, other=-200.0)
        w = tl.where(x >= floor, _exp(x), 0.0).to(tl.float64)
        after = running + tl.sum(w, 0)
        if (after > target) | (start + CHUNK >= count):
            cumulative = running + tl.cumsum(w, 0)
            # A scan rounds in another order than a sum: where none exceeds, it is the last one.
            passed = tl.min(tl.where((cumulative > target) & (w > 0), lane, CHUNK), 0)
            last = tl.max(tl.where(w > 0, lane, -1), 0)
            found = start + tl.minimum(passed, last)
        running = after
        start += CHUNK
    return tl.maximum(found, 0)


@triton.jit
def _draw(
    values_ptr, ids_ptr, best, temperature, min_floor, top_k, top_p, uniform,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, CHUNK)
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, VOCAB, CHUNK):
        ok = start + lane < VOCAB
        x = tl.load(values_ptr + start + lane, mask=ok, other=float("-inf"))
        # Relative to the best one. Below -104 a weight is 0 in fp32, and -inf would give NaN.
        x = tl.maximum(tl.div_rn(x - best, temperature), -200.0)
        tl.store(values_ptr + start + lane, x, mask=ok)
        total += tl.sum(tl.where(ok, _exp(x), 0.0).to(tl.float64), 0)
    tl.debug_barrier()
    count = tl.full([], VOCAB, tl.int32)
    compacted = tl.full([], 0, tl.int32)
    floor = tl.full([], -150.0, tl.float32)
    if (top_k > 0) & (top_k < VOCAB):
        floor, count, compacted = _search(
            values_ptr, ids_ptr, count, compacted, floor, top_k.to(tl.float64), True, CHUNK
        )
        total = _mass(values_ptr, count, floor, CHUNK)
    if top_p < 1:
        floor, count, compacted = _search(
            values_ptr, ids_ptr, count, compacted, floor, top_p * total, False, CHUNK
        )
    floor = tl.maximum(floor, min_floor)
    if (top_p < 1) | (min_floor > float("-inf")):
        total = _mass(values_ptr, count, floor, CHUNK)
    place = _pick(values_ptr, count, floor, uniform * total, CHUNK)
    stood = tl.load(ids_ptr + place, mask=compacted != 0, other=0)
    return tl.where(compacted != 0, stood, place)


@triton.jit
def _draw_kernel(
    work_ptr,  # fp32 [rows, VOCAB], used up
    ids_ptr,  # int32 [rows, CHUNK], scratch
    best_ptr,
    where_ptr,
    numbers_ptr,
    top_ps_ptr,  # fp64 [rows]
    top_ks_ptr,  # int32 [rows]
    seeds_ptr,  # int64 [rows]
    positions_ptr,
    slots_ptr,
    history_ptr,
    recent_ptr,
    out_ptr,  # int64 [rows]
    max_rows,
    tiles,
    VOCAB: tl.constexpr,
    TILES_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    ADJUST: tl.constexpr,
):
    row = tl.program_id(0)
    index = tl.arange(0, TILES_PAD)
    bests = tl.load(best_ptr + row * tiles + index, mask=index < tiles, other=float("-inf"))
    best = tl.max(bests, 0)
    places = tl.load(where_ptr + row * tiles + index, mask=index < tiles, other=VOCAB)
    token = tl.min(tl.where(bests == best, places, VOCAB), 0)
    usable = (best > float("-inf")) & (best < float("inf"))
    if ADJUST:
        temperature = tl.load(numbers_ptr + 3 * max_rows + row)
        position = tl.load(positions_ptr + row)
        if usable & (temperature > 0):
            token = _draw(
                work_ptr + row.to(tl.int64) * VOCAB, ids_ptr + row * CHUNK, best, temperature,
                tl.load(numbers_ptr + 4 * max_rows + row), tl.load(top_ks_ptr + row),
                tl.load(top_ps_ptr + row), _uniform(tl.load(seeds_ptr + row), position),
                VOCAB, CHUNK,
            )  # fmt: skip
        slot = tl.load(slots_ptr + row)
        recent = recent_ptr + 2 * tl.maximum(slot, 0)
        last = tl.load(recent)
        is_next = (slot >= 0) & (tl.load(recent + 1) == position - 1)
        entry = history_ptr + tl.maximum(slot, 0).to(tl.int64) * VOCAB + last
        tl.store(entry, tl.load(entry, mask=is_next, other=0) + 2, mask=is_next)
        tl.debug_barrier()
        tl.store(recent, token, mask=slot >= 0)
        tl.store(recent + 1, position, mask=slot >= 0)
    tl.store(out_ptr + row, tl.where(usable, token, -1).to(tl.int64))


@triton.jit
def _top_kernel(
    logits_ptr,
    tokens_ptr,  # int64 [rows], -1: none
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
    top, token = tl.minimum(tl.load(tops_ptr + row), MOST), tl.load(tokens_ptr + row)
    if (top < 0) | (token < 0):
        return
    at = tile * TILE + tl.arange(0, TILE)
    source = logits_ptr + row.to(tl.int64) * VOCAB
    x = tl.load(source + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
    chosen = tl.load(source + token).to(tl.float32)
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
    top, token = tl.minimum(tl.load(tops_ptr + row), MOST), tl.load(tokens_ptr + row)
    if (top < 0) | (token < 0):
        return
    tile = tl.arange(0, TILES_PAD)
    ok = tile < tiles
    sums = sums_ptr + 2 * (row * tiles + tile)
    largest = tl.load(sums, mask=ok, other=float("-inf"))
    best = tl.max(largest, 0)
    share = tl.load(sums + 1, mask=ok, other=0.0) * _exp(tl.maximum(largest - best, -200.0))
    total = best + tl.log(tl.sum(share, 0))
    chosen = tl.load(logits_ptr + row.to(tl.int64) * VOCAB + token).to(tl.float32)
    tl.store(logprob_ptr + row, chosen - total)
    rank = tl.sum(tl.load(ranks_ptr + row * tiles + tile, mask=ok, other=0), 0)
    tl.store(rank_ptr + row, rank + 1)

    n = tl.arange(0, MOST_PAD)
    source = (row * tiles + tile)[:, None] * MOST + n[None, :]
    known = ok[:, None] & (n < top)[None, :]
    x = tl.load(top_values_ptr + source, mask=known, other=float("-inf"))
    ids = tl.load(top_ids_ptr + source, mask=known, other=VOCAB)
    for i in range(0, top):
        value = tl.max(tl.max(x, 1), 0)
        index = tl.min(tl.min(tl.where(x == value, ids, VOCAB), 1), 0)
        tl.store(ids_ptr + row * MOST + i, index)
        tl.store(values_ptr + row * MOST + i, value - total)
        x = tl.where(ids == index, float("-inf"), x)
