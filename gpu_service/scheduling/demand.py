"""What there is to do, as averages: all that the decision about modes knows of the requests."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_service.scheduling.plan import Tier
from gpu_service.scheduling.state import SchedulerState


@dataclass(frozen=True)
class Demand:
    """Lengths in tokens."""

    choices: int
    """That run or wait."""
    gpu_rows: float
    """As many of them as the GPU tier holds."""
    context: float
    """Attended by a decode row, on average over its life."""
    prompt: float
    """Still to be computed, of a choice that waits; 0 where nobody does."""
    output: float
    """Still to be decoded by one that waits, on average (where nobody does, by one that runs)."""
    host_choices: int
    """That the host tier may take or has: within its pool, and within what may run."""
    host_context: float
    """Attended by a row of theirs."""
    queued: bool
    """Some have no room on the GPU tier."""
    waiting: int
    """Hold no blocks yet."""
    on_host: int
    """Are on the host tier."""

    @property
    def prompt_per_token(self) -> float:
        """Prompt tokens to compute for each token that is decoded, in the long run."""
        return self.prompt / max(self.output, 1.0) if self.queued else 0.0


def demand_of(state: SchedulerState, ended_early: float) -> Demand:
    """`ended_early`: part of their `max_tokens` that choices take before they end."""
    limits = state.limits
    ahead = state.ahead()
    waiting = len(state.waiting)
    known = [*state.running, *ahead]
    if not known:
        return Demand(0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, False, 0, 0)
    left = [max(1.0, ended_early * (c.final_length - c.length)) for c in known]
    ahead_left = left[len(state.running) :] or left
    context = sum(c.length + left[i] / 2 for i, c in enumerate(known)) / len(known)
    prompts = [c.length - c.computed for c in ahead]
    pool = limits.gpu_blocks * limits.block_tokens
    # Half of its last block is empty, and what is being prefilled does not decode.
    held = max(1.0, pool / (context + limits.block_tokens / 2))
    choices = len(state.running) + waiting
    movable = sum(1 for c in known if Tier.HOST in c.request.tiers)
    candidates = max(0.0, choices * movable / len(known) - held)
    host_pool = limits.host_blocks * limits.block_tokens
    room = min(
        host_pool / (context + limits.block_tokens / 2), max(0.0, limits.running_bound - held)
    )
    return Demand(
        choices=choices,
        gpu_rows=min(held, float(choices)),
        context=context,
        prompt=sum(prompts) / len(prompts) if prompts else 0.0,
        output=sum(ahead_left) / len(ahead_left),
        host_choices=int(min(candidates, room)),
        host_context=context,
        queued=choices > held,
        waiting=waiting,
        on_host=sum(c.tier is Tier.HOST for c in state.running),
    )
