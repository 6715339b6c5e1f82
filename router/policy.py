"""Which backend gets the next call: pure functions of what is known about each.

A decode sweep reads every running request's KV, and admission waits for KV room, so *KV tokens* are
what a backend is short of; the load of a backend is the part of its KV room (both tiers) that is
spoken for:

    used by running requests  +  prompts in its queue  +  calls sent since the snapshot
    -----------------------------------------------------------------------------------
                           KV room of both tiers, in tokens

The third term is what makes a burst between two snapshots spread: each call sent counts at once, as
one more request of average size.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass

UNKNOWN_REQUEST_TOKENS = 512
"""Assumed size of a call on a backend that runs nothing to take an average of."""


class BackendState(enum.Enum):
    """See neo.v1.BackendState."""

    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"
    DRAINING = "draining"


@dataclass(frozen=True)
class LoadView:
    """The part of a neo.v1.LoadSnapshot that the choice needs."""

    total_tokens: int
    """KV room of both tiers."""
    used_tokens: int
    running_requests: int
    waiting_requests: int
    waiting_prompt_tokens: int
    max_waiting_requests: int
    """0 means no bound."""


@dataclass(frozen=True)
class BackendView:
    """One backend at the moment of choosing."""

    address: str
    state: BackendState
    load: LoadView | None
    """None before the first snapshot."""
    in_flight: int
    """Calls that this router has open on it."""
    unseen: int
    """Those of them that are younger than the snapshot, and so not counted in it."""


def pressure(backend: BackendView) -> float:
    """Part of the backend's KV room that is spoken for; more than 1 when calls must queue."""
    load = backend.load
    if load is None or load.total_tokens == 0:
        return float(backend.in_flight)
    mean = load.used_tokens / load.running_requests if load.running_requests else 0.0
    waiting = max(load.waiting_prompt_tokens, load.waiting_requests * mean)
    unseen = backend.unseen * (mean or UNKNOWN_REQUEST_TOKENS)
    return (load.used_tokens + waiting + unseen) / load.total_tokens


def queue_is_full(backend: BackendView) -> bool:
    """Whether the backend would refuse one more call."""
    load = backend.load
    if load is None or load.max_waiting_requests == 0:
        return False
    return load.waiting_requests + backend.unseen >= load.max_waiting_requests


def choose(backends: Sequence[BackendView], tried: Collection[str] = ()) -> str | None:
    """Address of the backend for the next call, or None when there is none to try.

    UP ones before SUSPECT ones, those with room in the queue before full ones, then the least
    pressure, then the fewest calls of ours, then the order of `backends` (rotate it to break ties
    fairly). `tried` are those that already failed this call. DOWN and DRAINING are never chosen.
    """
    usable = [
        backend
        for backend in backends
        if backend.state in (BackendState.UP, BackendState.SUSPECT) and backend.address not in tried
    ]
    if not usable:
        return None
    return min(
        usable,
        key=lambda b: (b.state is not BackendState.UP, queue_is_full(b), pressure(b), b.in_flight),
    ).address
