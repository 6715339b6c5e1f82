"""How to run the fleet that was found: spares, and when to scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from neo_plan.search import Found, Search, with_spares

LOADS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
SCALE_AT = 0.8
"""Of what a replica holds: a new one takes minutes to start, in which demand may grow."""


@dataclass(frozen=True)
class Advice:
    replicas: int
    """With spares."""
    zones: int
    per_hour: float
    most_requests_per_second: float
    """That one replica holds within the targets."""
    most_in_system: float
    """Requests that then wait or run on it, on average."""
    scale_at: float
    """Requests in a replica, waiting and running, at which to add one."""
    gpu_busy: float
    """With all replicas up."""
    cpu_busy: float
    by_load: dict[float, int]
    """Multiple of the demand -> replicas, spares included."""


def advise(search: Search, best: Found) -> Advice:
    most, trial = search.most(best)
    rate = search.demand.rate * search.demand.scale
    zones, replicas = best.zones, best.total
    assert best.trial is not None
    fewer = best.replicas / replicas
    return Advice(
        replicas=replicas,
        zones=zones,
        per_hour=round(best.per_hour, 4),
        most_requests_per_second=round(most, 4),
        most_in_system=trial.in_system,
        scale_at=round(SCALE_AT * trial.in_system, 1),
        gpu_busy=round(best.trial.gpu_busy * fewer, 4),
        cpu_busy=round(best.trial.cpu_busy * fewer, 4),
        by_load={
            load: with_spares(max(math.ceil(load * rate / most - 1e-9), 1), zones) for load in LOADS
        },
    )
