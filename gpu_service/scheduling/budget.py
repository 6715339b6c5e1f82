"""How large a chunk of prompts is added to an iteration whose decode rows are known.

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
from gpu_service.scheduling.batching import BatchBuilder
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import Tier
from gpu_service.scheduling.state import SchedulerState


def bound_chunks(state: SchedulerState, costs: SweepCosts | None, batch: BatchBuilder) -> None:
    """How many prompts the iteration may have beside the decode rows that `batch` has, and tokens
    of them: all that `limits.max_batch_tokens` leaves without costs."""
    if costs is None:
        return
    with_host = state.usable(Tier.HOST) and bool(state.running_on(Tier.HOST))
    if with_host and state.limits.captured_chunks:
        batch.chunks = state.limits.captured_chunks
    batch.budget = _chunk_budget(state, costs, batch, with_host)


def _chunk_budget(
    state: SchedulerState, costs: SweepCosts, batch: BatchBuilder, with_host: bool
) -> int:
    decode, context = batch.device_rows
    beside = state.limits.cohort_rows if with_host else 0
    waited = 0 if state.defers else batch.host_rows
    in_first = waited // 2 if state.splits else waited  # of two sub-batches, about
    padded = costs.padded_decode(decode) + beside + in_first
    limit = state.limits.max_batch_tokens
    sizes = [size for size in costs.mixed_sizes if padded < size <= limit]
    if not sizes:
        return batch.budget
    if with_host and state.limits.captured_rows:
        # If there is no room for a chunk in those, the smallest of the others.
        sizes = [size for size in sizes if size <= state.limits.captured_rows] or sizes[:1]
    prefilling, tokens = _prompts(state)
    lost = prefilling + _missing_host_rows(state)
    idle = costs.decode_ms(decode, context) * (1 - lost / decode) if decode else 0.0

    def cost(size: int) -> float:
        used = min(size - padded, tokens or limit)
        return (costs.mixed_ms(padded + used, context) - idle) / used

    return min(batch.budget, min(sizes, key=cost) - padded)


def _prompts(state: SchedulerState) -> tuple[int, int]:
    """Choices whose prompts the next iterations compute, and the tokens that they lack."""
    under_way = [
        choice.length - choice.computed
        for choice in state.running
        if choice.tier and state.usable(choice.tier) and not choice.is_decoding
    ]
    count, tokens = _startable(state)
    return len(under_way) + count, sum(under_way) + tokens


def _missing_host_rows(state: SchedulerState) -> float:
    """Host rows a sweep that there would be if the host tier held what was decided: prompts have to
    be computed first, and each sweep until then lacks them."""
    decision = state.decision
    if decision is None or not decision.resident_tokens:
        return 0.0
    missing = max(0.0, state.host_wants()) / decision.resident_tokens
    return missing * (decision.host_rows + decision.streamed_rows)


def _startable(state: SchedulerState) -> tuple[int, int]:
    """Waiting choices that the GPU tier's free blocks would hold, or staging on their way to the
    host, and their tokens."""
    limits, gpu = state.limits, state.pools[Tier.GPU].free_count
    staging = limits.streamed_blocks if limits.staged_prompts else 0
    room = limits.running_bound - len(state.running)
    count = tokens = 0
    for choice in state.waiting:
        needed = blocks_for(choice.length, limits.block_tokens)
        if needed <= gpu:
            gpu -= needed
        elif needed <= staging and Tier.HOST in state.start_tiers(choice):
            staging -= needed
        else:
            break
        if count >= room:
            break
        count += 1
        tokens += choice.length
    return count, tokens
