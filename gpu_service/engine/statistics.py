"""Moving averages of what iterations take and bring."""

from __future__ import annotations

AVERAGED_ITERATIONS = 32
"""About as many iterations as an average looks back."""


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
