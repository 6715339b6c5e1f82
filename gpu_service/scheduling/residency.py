"""Which tier each running choice is on: growing tables, demotion, promotion, and recomputation as
the last resort.

    GPU tier full    the newest choice that may go to the host is demoted and goes on decoding there
                     (none may, or there is no room: the newest is recomputed later)
    host tier full   the oldest host choice that may is promoted (else the newest is recomputed)
    GPU blocks free  the oldest host choice is promoted, with headroom
    no host prefill  choices that prefer the host are demoted once they decode; while others wait
                     for GPU blocks, the newest that decodes is; and nobody is promoted meanwhile

Hysteresis: a promotion leaves `PROMOTION_HORIZON_TOKENS` of growth free for every choice on the GPU
tier, and a demotion happens only when not one block is left, so a choice cannot come back before
the GPU's choices have grown by that much or one of them has ended.
"""

from __future__ import annotations

from gpu_service.kv.table import blocks_for
from gpu_service.scheduling.admission import ADMISSION_HORIZON_TOKENS, fits
from gpu_service.scheduling.plan import Migration, Tier
from gpu_service.scheduling.request import Choice
from gpu_service.scheduling.state import SchedulerState

PROMOTION_HORIZON_TOKENS = 64
HASTE_TOKENS = 512
"""Prompts under way that are enough for the next sweep: the rows of the largest captured one."""
PROMOTION_WORTH_TOKENS = 8
"""A choice this near to its end stays where it is: the copy would cost more than it gains."""


def grow(state: SchedulerState) -> list[Migration]:
    """Make sure that every decoding choice of a usable tier has room for its next token, the oldest
    first."""
    migrations: list[Migration] = []
    for tier in (Tier.GPU, Tier.HOST):
        if not state.usable(tier):
            continue
        for choice in state.running_on(tier):
            # A choice that made room for an older one has moved on or waits.
            while (
                choice.tier is tier
                and choice.flight is None
                and not choice.is_ending
                and not state.reserve(choice, choice.length)
            ):
                moved = _make_room(state, tier)
                if moved is not None:
                    migrations.append(moved)
    return migrations


def _make_room(state: SchedulerState, tier: Tier) -> Migration | None:
    """Move one choice off `tier` or, where nothing else is possible, throw its KV away."""
    residents = state.running_on(tier)
    newest_first = residents[::-1]
    for choice in newest_first if tier is Tier.GPU else residents:
        if may_move(state, choice):
            return state.migrate(choice)
    # Blocks of a choice that is under way would not be free yet; whoever asks for room is not.
    state.preempt(next(choice for choice in newest_first if choice.flight is None))
    return None


def may_move(state: SchedulerState, choice: Choice, wants: float | None = None) -> bool:
    """The choice may be on the other tier, is wanted, and fits there now. `wants`: of
    `SchedulerState.host_wants`, where it is known."""
    assert choice.tier is not None
    target = choice.tier.other
    blocks = blocks_for(choice.length, state.limits.block_tokens)
    allowed = target in choice.request.tiers and _settled(state, choice)
    return (
        allowed
        and state.fits(target, blocks)
        and (target is Tier.GPU or state.host_takes(choice, wants))
    )


def _settled(state: SchedulerState, choice: Choice) -> bool:
    """It can change its tier now: no row of it is under way, and on the host it could go on."""
    goes_on = state.prefills_on_host(choice) or choice.tier is Tier.HOST or choice.is_decoding
    return state.host_up and choice.flight is None and goes_on


def send_down(state: SchedulerState) -> list[Migration]:
    """Where prompts, or long ones, are computed on the GPU tier alone: at most one demotion an
    iteration, of a choice that decodes."""
    limits = state.limits
    if (limits.host_prefill and not limits.staged_prompts) or not state.usable(Tier.HOST):
        return []
    wants = state.host_wants()
    decoding = [
        choice
        for choice in reversed(state.running_on(Tier.GPU))
        if choice.is_decoding and not choice.is_ending and may_move(state, choice, wants)
    ]
    for choice in decoding:
        if choice.request.tiers[0] is Tier.HOST:
            return [state.migrate(choice, beside=True)]
    leaves = bool(decoding) and _somebody_waits(state)
    return [state.migrate(decoding[0], beside=True)] if leaves else []


def _somebody_waits(state: SchedulerState) -> bool:
    """For GPU blocks, and for nothing else: no prompt is being computed that it would wait for."""
    head = next(iter(state.waiting), None)
    if head is None or len(state.running) >= state.limits.running_bound:
        return False
    prompts = [c.length - c.computed for c in state.running_on(Tier.GPU) if not c.is_decoding]
    # A host that is short of work gets it as fast as prompts are computed.
    most = HASTE_TOKENS if state.decision is not None else 1
    if sum(prompts) >= most:
        return False
    headroom = {Tier.GPU: state.growth(Tier.GPU, ADMISSION_HORIZON_TOKENS)}
    return not fits(state, head, Tier.GPU, headroom)


def promote(state: SchedulerState) -> list[Migration]:
    """At most one promotion an iteration, so that its copy stays short."""
    decision = state.decision
    leaves = decision is not None and decision.resident_tokens == 0
    stays_while_others_wait = not state.limits.host_prefill if decision is None else not leaves
    if stays_while_others_wait and len(state.waiting):
        return []
    for choice in state.running_on(Tier.HOST):
        nearly_done = choice.final_length - choice.length < PROMOTION_WORTH_TOKENS
        # A choice that prefers the host stays there, while anybody decodes there.
        prefers = choice.request.tiers[0] is Tier.HOST and not (
            leaves and Tier.GPU in choice.request.tiers
        )
        stays = (nearly_done and not leaves) or choice.flight is not None or prefers
        if stays or not state.host_up:
            continue
        blocks = blocks_for(
            choice.length_after(PROMOTION_HORIZON_TOKENS), state.limits.block_tokens
        )
        headroom = state.growth(Tier.GPU, PROMOTION_HORIZON_TOKENS)
        # Oldest first: a newer one must not overtake it for ever.
        fits = state.fits(Tier.GPU, blocks + headroom)
        return [state.migrate(choice, beside=True)] if fits else []
    return []


def force(state: SchedulerState, iteration: int) -> list[Migration]:
    """The testing aid: move one choice, a different one each time, wherever placement and room
    allow it."""
    every = state.limits.force_migration_every
    if not every or iteration % every or not state.running:
        return []
    first = (iteration // every) % len(state.running)
    for choice in state.running[first:] + state.running[:first]:
        # `always` pins choices to the host, but this aid exists to move them.
        allowed = choice.request.submit.placement != "gpu_only"
        target = choice.tier.other if choice.tier else Tier.GPU
        blocks = blocks_for(choice.length, state.limits.block_tokens)
        settled = choice.computed and _settled(state, choice)
        if allowed and settled and state.fits(target, blocks):
            return [state.migrate(choice)]
    return []
