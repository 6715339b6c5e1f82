"""Moving averages of what iterations take and bring."""

from __future__ import annotations

from collections.abc import Mapping

from gpu_service.scheduling.plan import IterationPlan, Tier

AVERAGED_ITERATIONS = 32
"""About as many iterations as an average looks back."""


RATE_SECONDS = 10.0
"""About as far as a rate looks back, of the time that counts for it."""


class Rate:
    """Amount per second of the time that counts, newer seconds weighing more."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    def observe(self, amount: float, seconds: float, weight: float = 1.0) -> None:
        """So much came in `seconds`."""
        keep = max(0.0, 1.0 - seconds / RATE_SECONDS)
        self._amount = keep * self._amount + weight * amount
        self._seconds = keep * self._seconds + weight * seconds

    @property
    def per_second(self) -> float:
        """0 while nothing is known."""
        return self._amount / self._seconds if self._seconds else 0.0


class LoadRates:
    """How fast an engine works off what requests wait for: prompts, and KV of each tier."""

    def __init__(self) -> None:
        self._prompts = Rate()
        self._freed = {tier: Rate() for tier in Tier}
        self._given_back = dict.fromkeys(Tier, 0)

    def observe(self, plan: IterationPlan, given_back: Mapping[Tier, int], seconds: float) -> None:
        """One iteration took `seconds`. given_back: KV tokens since the engine started."""
        prompts = sum(len(row.token_ids) for batch in plan.batches for row in batch.prefill)
        if prompts:
            # By their tokens: a short prompt takes a whole sweep, too, and says little of how long
            # a queue of others would take.
            self._prompts.observe(prompts, seconds, weight=prompts)
        for tier, rate in self._freed.items():
            rate.observe(given_back[tier] - self._given_back[tier], seconds)
        self._given_back = dict(given_back)

    @property
    def prompt_tokens_per_second(self) -> float:
        """Of iterations with prompts."""
        return self._prompts.per_second

    def freed_tokens_per_second(self, tier: Tier) -> float:
        return self._freed[tier].per_second


class IterationStatistics:
    """Fed after each iteration; idle time between iterations counts for nothing."""

    def __init__(self) -> None:
        self.iterations = 0
        """Since start."""
        self._window = 0
        self.iteration_seconds = 0.0
        self._tokens = 0.0

    def observe(self, seconds: float, tokens: int) -> None:
        """One iteration took `seconds` and sampled `tokens` tokens."""
        self.iterations += 1
        self._window = min(self._window + 1, AVERAGED_ITERATIONS)
        # A plain mean at first, so that the first iteration does not linger.
        weight = 1.0 / self._window
        self.iteration_seconds += weight * (seconds - self.iteration_seconds)
        self._tokens += weight * (tokens - self._tokens)

    def idle(self) -> None:
        """Nothing is running: no tokens come, and the next iterations start a new average."""
        self._tokens = 0.0
        self._window = 0

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self.iteration_seconds if self.iteration_seconds else 0.0
