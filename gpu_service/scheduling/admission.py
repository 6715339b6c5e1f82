"""Who leaves the queue: first come, first served within a priority, over both tiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpu_service.kv.table import blocks_for
from gpu_service.scheduling.batching import BatchBuilder
from gpu_service.scheduling.plan import Failure, Migration, Tier
from gpu_service.scheduling.request import Choice, Request
from gpu_service.scheduling.reuse import reusable
from gpu_service.scheduling.state import SchedulerState

ADMISSION_HORIZON_TOKENS = 32
"""A choice is admitted to a tier if everyone there, itself included, can then grow by this much."""


def refuse(state: SchedulerState, request: Request, unstarted: int) -> Failure | None:
    """Why a new request cannot even be queued; `unstarted` requests wait for their first iteration
    already."""
    limits, prompt = state.limits, len(request.prompt)
    if prompt == 0:
        return Failure("INVALID_ARGUMENT", "prompt must not be empty")
    if prompt >= limits.max_context_tokens:
        return Failure(
            "INVALID_ARGUMENT",
            f"prompt has {prompt} tokens, and this deployment serves at most "
            f"{limits.max_context_tokens} of prompt and output together",
        )
    # The last token is never computed.
    needed = blocks_for(request.choices[0].final_length - 1, limits.block_tokens)
    # Whoever is preempted starts again, with all its tokens.
    tiers = state.start_tiers(request.choices[0])
    largest = max(state.pools[tier].total for tier in tiers)
    if needed > largest:
        where = " and ".join(tier.value for tier in tiers)
        return Failure(
            "NEVER_FITS",
            f"prompt and sampling.max_tokens need {needed} KV blocks of {limits.block_tokens} "
            f"tokens, and the {where} tier that the request may use has {largest}",
        )
    if unstarted >= limits.max_waiting_requests:
        return Failure("QUEUE_FULL", f"{unstarted} requests are waiting already")
    return None


@dataclass
class Admitted:
    choices: list[Choice] = field(default_factory=list)
    copies: list[Migration] = field(default_factory=list)
    """Of KV that was found on the other tier."""


def admit(state: SchedulerState, batch: BatchBuilder) -> Admitted:
    """Start waiting choices while budget and blocks last.

    A choice that finds no room holds back everyone behind it on the tiers where it may be, and on
    no others. What is copied costs no budget, but everyone's sweep waits for it: once there is as
    much of it as one iteration may compute, the others start in the next."""
    admitted = Admitted()
    copied_tokens = 0
    open_tiers = {tier for tier in Tier if state.usable(tier)}
    returning, wants = _returning(state), state.host_wants()
    headroom = {tier: state.growth(tier, ADMISSION_HORIZON_TOKENS) for tier in open_tiers}
    # Once no tier is open the rest of the queue need not be looked at.
    for choice in list(state.waiting):
        room = batch.budget > 0 and len(state.running) < state.limits.running_bound
        if not room or not open_tiers or copied_tokens >= state.limits.max_batch_tokens:
            break
        tier = next(
            (
                t
                for t in state.start_tiers(choice)
                if t in open_tiers
                and (
                    state.host_takes(choice, wants) if t is Tier.HOST else choice.order < returning
                )
                and batch.has_room(choice, t)
                and fits(state, choice, t, headroom)
            ),
            None,
        )
        if tier is None:
            open_tiers.difference_update(state.start_tiers(choice))
            continue
        wants -= choice.length if tier is Tier.HOST else 0
        copy = state.start(choice, tier, reusable(state, choice, tier))
        if copy is not None:
            admitted.copies.append(copy)
            copied_tokens += copy.tokens
        headroom[tier] += state.growth_of(choice, ADMISSION_HORIZON_TOKENS)
        batch.add(choice, starts=True)
        admitted.choices.append(choice)
    return admitted


def _returning(state: SchedulerState) -> tuple[float, ...]:
    """Order of the oldest choice on the host tier that waits to leave it, since nobody decodes
    there any more: nobody younger takes the GPU's blocks before it. While the host tier is away it
    could not take them, and holds nobody back."""
    decision = state.decision
    if state.host_up and decision is not None and decision.resident_tokens == 0:
        for choice in state.running_on(Tier.HOST):
            if Tier.GPU in choice.request.tiers and not state.never_on_gpu(choice):
                return choice.order
    return (float("inf"),)


def fits(state: SchedulerState, choice: Choice, tier: Tier, headroom: Mapping[Tier, int]) -> bool:
    """Whether it may start there. `headroom`: blocks that those on each tier will soon ask for."""
    size, pool = state.limits.block_tokens, state.pools[tier]
    held = reusable(state, choice, tier).held
    # Those of them that are free are taken from what there is.
    shared = len(held) - pool.idle_among(held)
    blocks = blocks_for(choice.length, size) - shared
    if pool.used_count == 0:
        # Alone it need not leave room to grow: it may move or be recomputed once it has outgrown
        # the tier.
        return pool.can_allocate(blocks)
    own = blocks_for(choice.length_after(ADMISSION_HORIZON_TOKENS), size) - shared
    return pool.can_allocate(own + headroom[tier])
