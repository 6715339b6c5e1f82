"""Calls that belong together go to the same backend, as long as it is not overloaded.

Where a key belongs follows from the key and the backends alone (rendezvous hashing, weighted by KV
room): every router says the same, and a backend that comes or goes moves only the keys that it gets
or had.

    key k   a: 0.93  c: 0.71  b: 0.20      one draw per backend and key; the order of the draws is
                ^ bound reached               the order in which backends are asked
                         ^ taken

Bounded load: a backend takes a call by affinity only up to a quarter more than its share of all
requests, so that one popular key cannot drown it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

from router.policies.simple import room
from router.policies.wait import least_wait
from router.views import BackendView, CallView

LOAD_FACTOR = 1.25
FREE_REQUESTS = 4
"""So many requests are no load: they decode side by side in one batch."""
PLACING_BLOCKS = 4
"""Where a prompt that begins like none before belongs follows from its first so many blocks."""
_MASK = (1 << 64) - 1


def session_affinity(backends: Sequence[BackendView], call: CallView) -> BackendView:
    """By the session that the client names; without one, the least predicted wait."""
    if not call.session:
        return least_wait(backends, call)
    return within_bound(in_order(backends, call.session), bounds(backends))


def prefix_affinity(backends: Sequence[BackendView], call: CallView) -> BackendView:
    """Where the longest beginning of the prompt was last, or else where its first blocks belong;
    without a whole block, the least predicted wait."""
    if not call.prefix:
        return least_wait(backends, call)
    limits = bounds(backends)
    by_address = {backend.address: backend for backend in backends}
    for address in reversed(call.known):
        backend = by_address.get(address)
        if backend is not None and backend.requests < limits[address]:
            return backend
    key = call.prefix[min(PLACING_BLOCKS, len(call.prefix)) - 1]
    return within_bound(in_order(backends, key), limits)


def bounds(backends: Sequence[BackendView]) -> dict[str, int]:
    """Address -> requests up to which it takes calls by affinity. Together they are more than there
    are requests, so that one backend at least has not reached its own."""
    total = sum(backend.requests for backend in backends) + 1
    rooms = sum(map(room, backends))
    return {
        backend.address: max(FREE_REQUESTS, math.ceil(LOAD_FACTOR * total * room(backend) / rooms))
        for backend in backends
    }


def within_bound(ordered: Sequence[BackendView], limits: dict[str, int]) -> BackendView:
    """The first that has not reached its bound."""
    return next(backend for backend in ordered if backend.requests < limits[backend.address])


def in_order(backends: Sequence[BackendView], key: bytes) -> list[BackendView]:
    """Those to which `key` belongs first."""
    number = _number(key)

    def draw(backend: BackendView) -> float:
        chance = (_mixed(number ^ _address_number(backend.address)) + 0.5) / 2.0**64
        return -math.log(min(chance, 1 - 2.0**-53)) / room(backend)

    return sorted(backends, key=lambda backend: (draw(backend), backend.address))


def _number(key: bytes) -> int:
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


@lru_cache(maxsize=4096)
def _address_number(address: str) -> int:
    return _number(address.encode())


def _mixed(value: int) -> int:
    """splitmix64's finaliser: each bit of `value` decides about each bit of the result."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
