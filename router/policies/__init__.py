"""Which backend gets the next call: pure functions of what is known about each.

A policy gets `candidates`, never none, and returns one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from router.policies.affinity import prefix_affinity, session_affinity
from router.policies.candidates import candidates
from router.policies.pressure import least_pressure
from router.policies.simple import power_of_two, round_robin
from router.policies.wait import least_wait
from router.views import BackendView, CallView

Policy = Callable[[Sequence[BackendView], CallView], BackendView]

POLICIES: Mapping[str, Policy] = {
    "predicted-wait": least_wait,
    "kv-pressure": least_pressure,
    "power-of-two": power_of_two,
    "prefix": prefix_affinity,
    "session": session_affinity,
    "round-robin": round_robin,
}
"""By the names that settings use."""
BY_PREFIX = frozenset({prefix_affinity})
"""Those that look at how prompts begin."""


def choose(
    policy: Policy,
    backends: Sequence[BackendView],
    call: CallView,
    tried: Collection[str] = (),
    *,
    with_room: bool = False,
) -> str | None:
    """Address of the backend for a call, or None when there is none to try."""
    usable = candidates(backends, tried, with_room=with_room)
    return policy(usable, call).address if usable else None
