"""The choice of a row's token, from what sampling_kernels.py left of its logits."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.sampling_kernels import _best, _choose, _exp, _is_filtered, _threshold, _total


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
def _mass(values_ptr, count, floor, CHUNK: tl.constexpr):
    """Sum of weights of values of at least `floor`, fp64."""
    lane = tl.arange(0, CHUNK)
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, count, CHUNK):
        x = tl.load(values_ptr + start + lane, mask=start + lane < count, other=-200.0)
        total += tl.sum(tl.where(x >= floor, _exp(x), 0.0).to(tl.float64), 0)
    return total


@triton.jit
def _search(
    values_ptr, count, low, high, wanted, COUNTS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The largest value in [low, high) such that those of at least it weigh (or are) `wanted`;
    `low` if none is.

    Each pass cuts the region in four between the smallest and the largest value in it, until those
    are equal.
    """
    lane = tl.arange(0, CHUNK)
    second = low + (tl.minimum(high, 0.0) - low) * 0.5
    first = low + (second - low) * 0.5
    third = second + (second - first)
    floor = low
    searching = count > 0
    while searching:
        m1 = tl.full([], 0.0, tl.float64)
        m2 = tl.full([], 0.0, tl.float64)
        m3 = tl.full([], 0.0, tl.float64)
        smallest = tl.full([], float("inf"), tl.float32)
        largest = tl.full([], float("-inf"), tl.float32)
        for start in range(0, count, CHUNK):
            x = tl.load(values_ptr + start + lane, mask=start + lane < count, other=-200.0)
            w = tl.where(x >= low, 1.0, 0.0) if COUNTS else _exp(x)
            m1 += tl.sum(tl.where(x >= first, w, 0.0).to(tl.float64), 0)
            m2 += tl.sum(tl.where(x >= second, w, 0.0).to(tl.float64), 0)
            m3 += tl.sum(tl.where(x >= third, w, 0.0).to(tl.float64), 0)
            inside = (x >= low) & (x < high)
            smallest = tl.minimum(smallest, tl.min(tl.where(inside, x, float("inf")), 0))
            largest = tl.maximum(largest, tl.max(tl.where(inside, x, float("-inf")), 0))
        if smallest >= largest:
            # One value is left, or none where rounding keeps the sum below the wanted one.
            floor = tl.where(smallest > largest, low, smallest)
            searching = False
        else:
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
    return floor


@triton.jit
def _pick(values_ptr, start, count, running, floor, target, CHUNK: tl.constexpr):
    """Index of the first value from `start` on at which the running weight exceeds `target`."""
    lane = tl.arange(0, CHUNK)
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
def _filtered(
    work_ptr, values_ptr, ids_ptr, chosen, gathered, total, min_floor, top_k, top_p, uniform,
    VOCAB: tl.constexpr, ROOM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A draw among what top-k, top-p and min-p keep."""
    fits = gathered <= ROOM
    source = values_ptr if fits else work_ptr
    count = tl.where(fits, gathered, VOCAB)
    floor = _threshold(chosen)
    high = tl.where(chosen == 0, 1.0, _threshold(chosen - 1))
    if (top_k > 0) & (top_k < VOCAB):
        floor = _search(source, count, floor, high, top_k.to(tl.float64), True, CHUNK)
        total = _mass(source, count, floor, CHUNK)
        high = 1.0
    if top_p < 1:
        floor = _search(source, count, floor, high, top_p * total, False, CHUNK)
    floor = tl.maximum(floor, min_floor)
    target = uniform * _mass(source, count, floor, CHUNK)
    nothing = tl.full([], 0.0, tl.float64)
    place = _pick(source, tl.full([], 0, tl.int32), count, nothing, floor, target, CHUNK)
    return tl.where(fits, tl.load(ids_ptr + place, mask=fits, other=0), place)


@triton.jit
def _unfiltered(
    work_ptr, sums_ptr, row, tiles, target,
    VOCAB: tl.constexpr, TILE: tl.constexpr, TILES_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A draw among all: the tile first, then the token in it."""
    tile = tl.arange(0, TILES_PAD)
    sums = tl.load(sums_ptr + row * tiles + tile, mask=tile < tiles, other=0.0)
    passed = (tl.cumsum(sums, 0) > target) & (sums > 0)
    found = tl.min(tl.where(passed, tile, TILES_PAD), 0)
    found = tl.minimum(found, tl.max(tl.where(sums > 0, tile, 0), 0))
    running = tl.sum(tl.where(tile < found, sums, 0.0), 0)
    return _pick(work_ptr, found * TILE, VOCAB, running, -150.0, target, CHUNK)


@triton.jit
def _draw_kernel(
    work_ptr,
    values_ptr,
    ids_ptr,
    best_ptr,
    where_ptr,
    sums_ptr,
    counts_ptr,
    masses_ptr,
    numbers_ptr,
    top_ps_ptr,
    top_ks_ptr,
    seeds_ptr,  # int64 [rows]
    positions_ptr,
    slots_ptr,
    history_ptr,
    recent_ptr,
    places_ptr,  # int32 [rows]: where in `out` a row's token goes; row by row unless ADJUST
    out_ptr,  # int64
    max_rows,
    tiles,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PAD: tl.constexpr,
    ROOM: tl.constexpr,
    CHUNK: tl.constexpr,
    ADJUST: tl.constexpr,
):
    row = tl.program_id(0)
    best, usable = _best(best_ptr, row, tiles, TILES_PAD)
    tile = tl.arange(0, TILES_PAD)
    bests = tl.load(best_ptr + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    places = tl.load(where_ptr + row * tiles + tile, mask=tile < tiles, other=VOCAB)
    token = tl.min(tl.where(bests == best, places, VOCAB), 0)
    if ADJUST:
        position = tl.load(positions_ptr + row)
        if usable & (tl.load(numbers_ptr + 3 * max_rows + row) > 0):
            top_k, top_p = tl.load(top_ks_ptr + row), tl.load(top_ps_ptr + row)
            min_floor = tl.load(numbers_ptr + 4 * max_rows + row)
            uniform = _uniform(tl.load(seeds_ptr + row), position)
            total = _total(sums_ptr, row, tiles, TILES_PAD)
            work_ptr += row.to(tl.int64) * VOCAB
            if _is_filtered(top_k, top_p, min_floor, VOCAB):
                chosen, counts = _choose(
                    counts_ptr, masses_ptr, row, tiles, total, top_k, top_p, min_floor,
                    VOCAB, TILES_PAD,
                )  # fmt: skip
                token = _filtered(
                    work_ptr, values_ptr + row * ROOM, ids_ptr + row * ROOM,
                    chosen, tl.sum(counts, 0), total, min_floor, top_k, top_p, uniform,
                    VOCAB, ROOM, CHUNK,
                )  # fmt: skip
            else:
                token = _unfiltered(
                    work_ptr, sums_ptr, row, tiles, uniform * total, VOCAB, TILE, TILES_PAD, CHUNK
                )
        token = tl.where(usable, token, -1)
        _remember(token, row, position, slots_ptr, history_ptr, recent_ptr, VOCAB)
        out_ptr += tl.load(places_ptr + row) - row
    tl.store(out_ptr + row, tl.where(usable, token, -1).to(tl.int64))


@triton.jit
def _remember(token, row, position, slots_ptr, history_ptr, recent_ptr, VOCAB: tl.constexpr):
    """Count the token before this one, and keep this one for the next time."""
    slot = tl.load(slots_ptr + row)
    recent = recent_ptr + 2 * tl.maximum(slot, 0)
    last = tl.load(recent)
    is_next = (slot >= 0) & (last >= 0) & (tl.load(recent + 1) == position - 1)
    entry = history_ptr + tl.maximum(slot, 0).to(tl.int64) * VOCAB + last
    seen = tl.load(entry, mask=is_next, other=0).to(tl.int32)
    tl.store(entry, tl.minimum(seen + 2, 32764 + (seen & 1)).to(tl.int16), mask=is_next)
    tl.debug_barrier()
    tl.store(recent, token, mask=slot >= 0)
    tl.store(recent + 1, position, mask=slot >= 0)
