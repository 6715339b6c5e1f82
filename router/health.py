"""What a backend's calls say of it: a circuit breaker, and whether it fails more than it should.

    closed ──── FAILURES in a row could not reach it ───> open: no calls
      ^                                                     │ a pause, doubled each time
      └─ the probe is answered ── half open: one call <─────┘
                                      └─ the probe fails ──> open

Before the circuit opens others are preferred for a moment after each failure. A backend that can be
reached but fails many of its calls is *ejected* for a while: used only where there is no other.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

SUSPECT_BASE_SECONDS = 0.25
SUSPECT_MAX_SECONDS = 10.0
OPEN_BASE_SECONDS = 1.0
OPEN_MAX_SECONDS = 30.0
EJECT_BASE_SECONDS = 10.0
EJECT_MAX_SECONDS = 300.0
FORGIVEN_SECONDS = 60.0
"""So long after an ejection ended the next one is short again."""
WINDOW_SECONDS = 10.0
BUCKETS = 10


class Circuit(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"
    """One call may probe."""
    PROBING = "probing"
    """It has been sent."""


@dataclass(frozen=True)
class HealthLimits:
    breaker_failures: int = 5
    """Failures in a row that open the circuit."""
    outlier_rate: float = 0.5
    """Part of its calls that an outlier fails, at least."""
    outlier_calls: int = 20
    """In the window; of fewer nothing can be said."""
    outlier_part: float = 0.5
    """Most of the backends that may be ejected at the same time."""


class CallHealth:
    """Of one backend. `now`: seconds of one monotonic clock."""

    def __init__(self, limits: HealthLimits) -> None:
        self._limits = limits
        self._in_a_row = 0
        self._suspect_until = 0.0
        self._open_until = 0.0
        self._opened = 0
        self._probing = False
        self._outcomes: deque[tuple[int, list[int]]] = deque()  # (number, [calls, failures])
        self._ejected_until = 0.0
        self._ejections = 0

    # What happens ----------------------------------------------------------------------------

    def sent(self, now: float) -> bool:
        """A call goes there; True when it is the probe of a half-open circuit, whose end must be
        told: `unreachable`, `answered` or `withdrawn`."""
        if self.circuit(now) is not Circuit.HALF_OPEN:
            return False
        self._probing = True
        return True

    def withdrawn(self) -> None:
        """The probe ended without telling anything: its client has gone."""
        self._probing = False

    def unreachable(self, now: float) -> None:
        """A call could not reach the backend, or lost it."""
        self._count(now, failed=True)
        backoff = SUSPECT_BASE_SECONDS * 2.0 ** min(self._in_a_row, 10)
        self._suspect_until = now + min(backoff, SUSPECT_MAX_SECONDS)
        self._in_a_row += 1
        if self._probing or self._in_a_row >= self._limits.breaker_failures:
            pause = OPEN_BASE_SECONDS * 2.0 ** min(self._opened, 10)
            self._open_until = now + min(pause, OPEN_MAX_SECONDS)
            # Calls that were under way when it opened do not make it longer.
            self._opened += self._in_a_row == self._limits.breaker_failures or self._probing
        self._probing = False

    def answered(self, now: float) -> None:
        """A call was answered, be it with an error that is the caller's."""
        self._count(now, failed=False)
        self._in_a_row = self._opened = 0
        self._suspect_until = 0.0
        self._probing = False

    def failed(self, now: float) -> None:
        """A call was answered with an error that is the backend's."""
        self._count(now, failed=True)
        self._probing = False

    def eject(self, now: float) -> None:
        if now > self._ejected_until + FORGIVEN_SECONDS:
            self._ejections = 0
        pause = EJECT_BASE_SECONDS * 2.0**self._ejections
        self._ejected_until = now + min(pause, EJECT_MAX_SECONDS)
        self._ejections = min(self._ejections + 1, 10)
        self._outcomes.clear()

    # What follows ----------------------------------------------------------------------------

    def circuit(self, now: float) -> Circuit:
        if self._in_a_row < self._limits.breaker_failures:
            return Circuit.CLOSED
        if self._probing:
            return Circuit.PROBING
        return Circuit.OPEN if now < self._open_until else Circuit.HALF_OPEN

    def is_suspect(self, now: float) -> bool:
        return now < self._suspect_until

    def is_ejected(self, now: float) -> bool:
        return now < self._ejected_until

    def failure_rate(self, now: float) -> float:
        """Of the calls in the window; 0 while there are too few to say."""
        self._forget(now)
        calls = sum(bucket[0] for _, bucket in self._outcomes)
        failures = sum(bucket[1] for _, bucket in self._outcomes)
        return failures / calls if calls >= self._limits.outlier_calls else 0.0

    def _count(self, now: float, *, failed: bool) -> None:
        self._forget(now)
        number = _bucket(now)
        if not self._outcomes or self._outcomes[-1][0] != number:
            self._outcomes.append((number, [0, 0]))
        self._outcomes[-1][1][0] += 1
        self._outcomes[-1][1][1] += failed

    def _forget(self, now: float) -> None:
        while self._outcomes and self._outcomes[0][0] <= _bucket(now) - BUCKETS:
            self._outcomes.popleft()


def _bucket(now: float) -> int:
    return int(now * BUCKETS / WINDOW_SECONDS)


def eject_outliers(
    backends: Sequence[CallHealth], now: float, limits: HealthLimits
) -> list[CallHealth]:
    """Those among the backends that are now ejected: they fail more than `outlier_rate` of their
    calls. Where that would be more than `outlier_part` of all, it is the calls or what is behind
    all backends, and the worst are ejected up to that part."""
    room = int(limits.outlier_part * len(backends)) - sum(b.is_ejected(now) for b in backends)
    rates = [(backend.failure_rate(now), n) for n, backend in enumerate(backends)]
    worst = sorted((r for r in rates if r[0] >= limits.outlier_rate), reverse=True)
    ejected = [backends[n] for _, n in worst[: max(0, room)] if not backends[n].is_ejected(now)]
    for backend in ejected:
        backend.eject(now)
    return ejected
