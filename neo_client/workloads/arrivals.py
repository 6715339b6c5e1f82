"""When requests come: seconds since the start, ascending, the same for the same seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import islice, takewhile


def poisson(count: int, rate: float, seed: int, burstiness: float = 1.0) -> list[float]:
    """Arrival times of `count` requests at `rate` a second."""
    return list(islice(_gamma(rate, seed, burstiness), count))


def poisson_until(seconds: float, rate: float, seed: int, burstiness: float = 1.0) -> list[float]:
    """Those within `seconds`."""
    return list(takewhile(lambda at: at < seconds, _gamma(rate, seed, burstiness)))


def _gamma(rate: float, seed: int, burstiness: float) -> Iterator[float]:
    """Gaps are gamma distributed with the shape `burstiness`, as in vLLM's benchmark: 1 is
    Poisson's process, less comes in bursts, more is evener."""
    if rate <= 0:
        raise ValueError("rate must be positive")
    if burstiness <= 0:
        raise ValueError("burstiness must be positive")
    draw, now = random.Random(seed), 0.0
    while True:
        if burstiness == 1.0:
            now += draw.expovariate(rate)
        else:
            now += draw.gammavariate(burstiness, 1 / (rate * burstiness))
        yield now


def ramp(first: float, last: float, seconds: float, seed: int) -> list[float]:
    """Poisson's process whose rate goes from `first` to `last` a second, linearly, in `seconds`."""
    if min(first, last) < 0 or max(first, last) == 0:
        raise ValueError("a ramp's rates must not be negative, and not both be 0")
    if seconds <= 0:
        raise ValueError("a ramp must take some time")
    # Expected arrivals until t are first * t + slope / 2 * t^2. Arrivals of a process of rate 1,
    # sent through the inverse of that.
    slope = (last - first) / seconds
    draw, passed = random.Random(seed), 0.0
    times: list[float] = []
    while True:
        passed += draw.expovariate(1.0)
        if slope == 0:
            at = passed / first
        else:
            inside = first * first + 2 * slope * passed
            if inside < 0:  # a falling rate has come to 0
                return times
            at = (math.sqrt(inside) - first) / slope
        if at >= seconds:
            return times
        times.append(at)
