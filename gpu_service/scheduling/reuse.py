"""What of a choice's KV is there already when it starts, and what it leaves to be found.

Blocks are found by their contents (`gpu_service.kv.keys`): those of another choice of the same
request, of another request with the same beginning, of the turn before in a conversation, or of the
choice itself before it was preempted. A block can be found once a sweep's result has said that it
is complete; from then on nobody writes into it.

    known tokens      |======== full blocks ========|== rest ==|    at least one token is the rest:
    on its tier       |=== held ===|                |          |    its logits are needed
    on the other      |    ...     |== copied ==|   |          |
    to compute                                  |--------------|

Held blocks are shared, copied ones are filled by a migration before the sweep. Whoever starts on
the host tier decodes over the blocks there, whoever starts on the GPU tier takes them along.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_service.scheduling.plan import Tier
from gpu_service.scheduling.request import Choice
from gpu_service.scheduling.state import SchedulerState


@dataclass(frozen=True)
class Reuse:
    """The blocks of a choice's first tokens, one after the other."""

    held: list[int]
    """On the tier where it starts."""
    copied: list[int]
    """Behind those, on the other tier."""
    looked_up: bool
    """By their contents; else only the other choices of its request were asked."""


def reusable(state: SchedulerState, choice: Choice, tier: Tier) -> Reuse:
    """For a choice that starts on this tier now."""
    limits = state.limits
    if choice.request.wants_prompt_logprobs and choice.index == 0:
        return Reuse([], [], looked_up=False)  # computes all that it reports
    if not limits.prefix_caching:
        return Reuse(state.shareable_blocks(choice, tier), [], looked_up=False)
    keys = choice.block_keys((choice.length - 1) // limits.block_tokens)
    held = state.pools[tier].find(keys)
    # What is kept in 8 bits is good enough for whoever starts there, and for nobody else.
    exact = tier is Tier.HOST or not limits.host_lossy
    rest = keys[len(held) :] if exact and state.usable(tier.other) else []
    return Reuse(held, state.pools[tier.other].find(rest), looked_up=True)


def publish(state: SchedulerState, choice: Choice, plan_number: int) -> None:
    """Let the choice's complete blocks be found, as far as the results of plans up to this one say
    that they are."""
    limits = state.limits
    complete = choice.confirmed // limits.block_tokens
    # What a migration of a later plan copies is not there yet.
    if complete <= choice.published or not limits.prefix_caching or plan_number < choice.moved:
        return
    if choice.lossy and choice.tier is Tier.GPU:
        return  # it has been in fewer bits: not what whoever starts there would compute
    assert choice.tier is not None
    keys = choice.block_keys(complete)
    blocks = choice.table.view()
    for place in range(choice.published, complete):
        state.pools[choice.tier].publish(int(blocks[place]), keys[place])
    choice.published = complete
