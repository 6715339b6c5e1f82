"""Which backends may get a call at all; what every policy has in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from router.views import BackendState, BackendView


def queue_is_full(backend: BackendView) -> bool:
    """Whether the backend would refuse one more call."""
    load = backend.load
    if load is None or load.max_waiting_requests == 0:
        return False
    return load.waiting_requests + backend.own.unseen >= load.max_waiting_requests


def candidates(
    backends: Sequence[BackendView], tried: Collection[str] = (), *, with_room: bool = False
) -> list[BackendView]:
    """Those that a policy may choose from, in order; none when there is nothing to try.

    UP ones before SUSPECT ones, those with room in the queue before full ones. `tried` are those
    that already failed this call. DOWN and DRAINING are never among them, nor those with a full
    queue when a call needs one `with_room`.
    """
    usable = [
        backend
        for backend in backends
        if backend.state in (BackendState.UP, BackendState.SUSPECT)
        and backend.address not in tried
        and not (with_room and queue_is_full(backend))
    ]
    if not usable:
        return []
    best = min(map(_rank, usable))
    return [backend for backend in usable if _rank(backend) == best]


def _rank(backend: BackendView) -> tuple[bool, bool]:
    return backend.state is not BackendState.UP, queue_is_full(backend)
