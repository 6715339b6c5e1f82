"""How fast something may go, and how fast it does."""

from __future__ import annotations

import math

_ROUNDING = 1e-6
PACE_SECONDS = 10.0
"""What happened longer ago hardly counts."""


class Bucket:
    """Holds up to `burst`, filled at `per_second`. It may be overdrawn: by a request that is larger
    than `burst`, which goes when the bucket is full, and by one that used more than it reserved.
    The debt is waited off, so that the rate holds in the long run."""

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self.per_second = per_second
        self.burst = burst
        self._level = burst
        self._at = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0 means now."""
        missing = min(amount, self.burst) - self._filled(now)
        return missing / self.per_second if missing > _ROUNDING else 0.0

    def take(self, amount: float, now: float) -> None:
        self._level = self._filled(now) - amount
        self._at = max(now, self._at)

    def change(self, per_second: float, burst: float, now: float) -> None:
        """New settings; what is in it stays, as far as it fits."""
        self._level = min(self._filled(now), burst)
        self._at = max(now, self._at)
        self.per_second, self.burst = per_second, burst

    def _filled(self, now: float) -> float:
        return min(self.burst, self._level + max(0.0, now - self._at) * self.per_second)


class Pace:
    """What is started per second while something waits, recent times first."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0
        self._last: float | None = None

    def started(self, amount: float, now: float, *, more: bool) -> None:
        """more: whether something still waits; if not, the time to the next start says nothing."""
        if self._last is not None:
            passed = max(0.0, now - self._last)
            kept = math.exp(-passed / PACE_SECONDS)
            self._amount = self._amount * kept + amount
            self._seconds = self._seconds * kept + passed
        self._last = now if more else None

    def waiting(self, now: float) -> None:
        """Something waits from now on."""
        if self._last is None:
            self._last = now

    def nobody_waits(self) -> None:
        self._last = None

    def seconds_for(self, amount: float, now: float) -> float:
        """How long starting `amount` takes; 0 when nothing is known."""
        if self._amount <= 0.0:
            return 0.0
        still = 0.0 if self._last is None else max(0.0, now - self._last)
        return amount * (self._seconds + still) / self._amount
