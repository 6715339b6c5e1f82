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
    """What is started per second while something waits, recent times first. Forgotten when nothing
    has waited for a while: an old bad time must not make everybody be refused who would show that
    it is over."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0
        self._since: float | None = None
        """While something waits: when the last start was, or the waiting began."""
        self._idle_since = 0.0

    def waits(self, now: float) -> None:
        """Something waits from now on."""
        if self._since is None:
            if self._forgotten(now):
                self._amount = self._seconds = 0.0
            self._since = now

    def started(self, amount: float, now: float) -> None:
        """Something that waited goes."""
        if self._since is not None:
            passed = max(0.0, now - self._since)
            kept = math.exp(-passed / PACE_SECONDS)
            self._amount = self._amount * kept + amount
            self._seconds = self._seconds * kept + passed
            self._since = now

    def nothing_waits(self, now: float) -> None:
        """The time to the next start will say nothing."""
        self.started(0.0, now)  # what waited may have left in vain
        self._since = None
        self._idle_since = now

    def seconds_for(self, amount: float, now: float) -> float:
        """How long starting `amount` takes; 0 when nothing is known."""
        if self._amount <= 0.0 or self._forgotten(now):
            return 0.0
        still = 0.0 if self._since is None else max(0.0, now - self._since)
        return amount * (self._seconds + still) / self._amount

    def _forgotten(self, now: float) -> bool:
        return self._since is None and now - self._idle_since > PACE_SECONDS
