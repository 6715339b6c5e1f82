"""How many tokens the next iteration takes: how large a chunk of waiting prompts to add to it.

A chunk slows down the decode rows beside it, and until it is done the choices that prefill do not
decode. Per prompt token, with d decode rows, r rows in all and b choices in prefill:

    ( T(r) - T(d)        what the chunk adds to the sweep
      + b T(d) / d )     tokens that b more decode rows would have brought in T(d)
    / (r - d)

Host rows that are missing since their prompts are still to be computed count in b, too. Rows are
padded ones: host rows in deferred mode take all their places beside a chunk. Those that are waited
for are rows of the iteration as decode rows are; in two sub-batches, half of them beside the chunk.

The smallest is taken. Where blocks are short, b is 1 or 2 and small chunks win, since they hide
under the pass over the weights; while many wait and have room, large ones do.
"""

from __future__ import annotations

from gpu_service.kv.table import blocks_for
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import Tier
from gpu_service.scheduling.state import SchedulerState


def token_budget(state: SchedulerState, costs: SweepCosts | None) -> int:
    """Tokens of the next iteration, `limits.max_batch_tokens` at most; that without costs."""
    limit = state.limits.max_batch_tokens
    if costs is None:
        return limit
    decode = context = prefill_tokens = prefilling = 0
    for choice in state.running:
        if choice.tier is not Tier.GPU or choice.is_ending:
            continue
        if choice.is_decoding:
            decode += 1
            context += choice.length
        else:
            prefilling += 1
            prefill_tokens += choice.length - choice.computed
    starting, tokens = _startable(state)
    prefilling, prefill_tokens = prefilling + starting, prefill_tokens + tokens
    beside = state.limits.cohort_rows if state.running_on(Tier.HOST) else 0
    waited = _waited_rows(state)
    in_first = waited // 2 if state.splits else waited  # of two sub-batches, about
    padded = costs.padded_decode(decode) + beside + in_first
    sizes = [size for size in costs.mixed_sizes if padded < size <= limit]
    if not sizes or not prefill_tokens:
        return limit
    lost = prefilling + _missing_host_rows(state)
    idle = costs.decode_ms(decode, context) * (1 - lost / decode) if decode else 0.0

    def cost(size: int) -> float:
        used = min(size - padded, prefill_tokens)
        return (costs.mixed_ms(padded + used, context) - idle) / used

    return min(limit, decode + waited + min(sizes, key=cost) - padded)


def _waited_rows(state: SchedulerState) -> int:
    """Host rows of the next iteration that are not deferred."""
    if state.defers or not state.host_up:
        return 0
    decision = state.decision
    rows = sum(c.is_decoding and not c.is_ending for c in state.running_on(Tier.HOST))
    return rows if decision is None else min(rows, round(decision.host_rows))


def _missing_host_rows(state: SchedulerState) -> float:
    """Host rows a sweep that there would be if the host tier held what was decided: prompts have to
    be computed first, and each sweep until then lacks them."""
    decision = state.decision
    if decision is None or not decision.resident_tokens:
        return 0.0
    missing = max(0.0, state.host_wants()) / decision.resident_tokens
    return missing * (decision.host_rows + decision.streamed_rows)


def _startable(state: SchedulerState) -> tuple[int, int]:
    """Waiting choices that the GPU tier's free blocks would hold, and their tokens."""
    free, size = state.pools[Tier.GPU].free_count, state.limits.block_tokens
    room = state.limits.running_bound - len(state.running)
    count = tokens = 0
    for choice in state.waiting:
        free -= blocks_for(choice.length, size)
        if free < 0 or count >= room:
            break
        count += 1
        tokens += choice.length
    return count, tokens
