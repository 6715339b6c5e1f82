"""Least KV pressure.

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

from collections.abc import Sequence

from router.views import BackendView, CallView

UNKNOWN_REQUEST_TOKENS = 512
"""Assumed size of a call on a backend that runs nothing to take an average of."""


def pressure(backend: BackendView) -> float:
    """Part of the backend's KV room that is spoken for; more than 1 when calls must queue."""
    load = backend.load
    if load is None or load.total_tokens == 0:
        return float(backend.own.open)
    mean = load.used_tokens / load.running_requests if load.running_requests else 0.0
    waiting = max(load.waiting_prompt_tokens, load.waiting_requests * mean)
    unseen = backend.own.unseen * (mean or UNKNOWN_REQUEST_TOKENS)
    return (load.used_tokens + waiting + unseen) / load.total_tokens


def least_pressure(backends: Sequence[BackendView], call: CallView) -> BackendView:
    """Ties go to the fewest calls of ours, then to the order of `backends`."""
    return min(backends, key=lambda backend: (pressure(backend), backend.own.open))
