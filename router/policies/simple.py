"""Policies that look at little: each in turn, the better of two."""

from __future__ import annotations

from collections.abc import Sequence

from router.policies.pressure import pressure
from router.policies.wait import predicted_wait
from router.views import BackendView, CallView


def round_robin(backends: Sequence[BackendView], call: CallView) -> BackendView:
    """Each in turn, by address."""
    return sorted(backends, key=lambda backend: backend.address)[call.turn % len(backends)]


def two_of(backends: Sequence[BackendView], chance: float) -> tuple[BackendView, BackendView]:
    """Two different ones (of one: itself, twice), drawn by their KV room: backends of unequal size
    would else get equal numbers of calls at times when both of two are small."""
    rooms = [room(backend) for backend in backends]
    if len(backends) == 1:
        return backends[0], backends[0]
    total = sum(rooms)
    first, rest = _draw(rooms, chance * total)
    # What is left of the draw decides about the second.
    others = [r if n != first else 0 for n, r in enumerate(rooms)]
    second, _ = _draw(others, rest / rooms[first] * (total - rooms[first]))
    return backends[first], backends[second]


def room(backend: BackendView) -> int:
    """KV tokens, at least one."""
    return max(1, backend.load.total_tokens if backend.load is not None else 1)


def _draw(weights: Sequence[int], at: float) -> tuple[int, float]:
    """The weight in whose part of their sum `at` lies, and how far into it."""
    last = max(n for n, weight in enumerate(weights) if weight)
    for number, weight in enumerate(weights):
        if at < weight or number == last:
            return number, min(at, float(weight))
        at -= weight
    raise AssertionError("no weights")


def power_of_two(backends: Sequence[BackendView], call: CallView) -> BackendView:
    """The one of two drawn where less wait is predicted, then the one with the less KV pressure:
    routers that know the same do not all run to the same backend."""
    return min(
        two_of(backends, call.chance),
        key=lambda backend: (predicted_wait(backend, call), pressure(backend), backend.address),
    )
