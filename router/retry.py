"""How often calls may be tried again: a budget for all of them, and a pause with jitter.

A call is worth another try when its backend has gone. When most backends have, tries would multiply
the load on those that are left; so retries are bounded by what the router does anyway:

    retries in the last 10 s  <  calls in the last 10 s * ratio  +  calls open now  +  a few

Calls open: one backend that dies under load takes all its calls along, and each of them may go
elsewhere, once. The few: a router with little to do must not lose its only call.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 10.0
BUCKETS = 10
MIN_RETRIES = 10
"""In a window, whatever the number of calls."""


class RetryBudget:
    """Counts calls and retries of one router; used by one event loop. `now`: seconds of one
    monotonic clock."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._buckets: deque[tuple[int, list[int]]] = deque()  # (number, [calls, retries])
        self._open = 0

    def began(self, now: float) -> None:
        """A call came; `ended` follows."""
        self._open += 1
        self._bucket(now)[0] += 1

    def ended(self) -> None:
        self._open -= 1

    def take(self, now: float) -> bool:
        """Whether one more retry may be made; if so it counts."""
        current = self._bucket(now)
        calls = sum(bucket[0] for _, bucket in self._buckets)
        retries = sum(bucket[1] for _, bucket in self._buckets)
        if retries >= calls * self._ratio + self._open + MIN_RETRIES:
            return False
        current[1] += 1
        return True

    def _bucket(self, now: float) -> list[int]:
        """The one for `now`; those that have left the window are dropped."""
        number = int(now * BUCKETS / WINDOW_SECONDS)
        while self._buckets and self._buckets[0][0] <= number - BUCKETS:
            self._buckets.popleft()
        if not self._buckets or self._buckets[-1][0] != number:
            self._buckets.append((number, [0, 0]))
        return self._buckets[-1][1]


def pause_seconds(
    retry: int, base: float, longest: float, *, draw: Callable[[], float] = random.random
) -> float:
    """Before the `retry`-th retry (from 1): anything up to a bound that doubles, so that calls
    which failed together do not come back together."""
    return draw() * min(base * 2.0 ** (retry - 1), longest)
