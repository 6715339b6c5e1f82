"""The router's backends together: a load watcher each, the choice for a call, word of changes.

apply(addresses)    new ones     ─> watched, DOWN until they report
                    those gone   ─> DRAINING: no new call, live ones go on
                                    └─ the last one has ended ─> closed and forgotten
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence

from router.backend import Backend
from router.chooser import Chooser
from router.health import HealthLimits, eject_outliers
from router.keys import CallKeys
from router.load import WatchTiming, watch
from router.views import BackendState

log = logging.getLogger("router.registry")


class Registry:
    """Owns the backends and their watchers between `start` and `close`; used by one event loop.

    make: a Backend for an address. addresses: those to begin with.
    """

    def __init__(
        self,
        make: Callable[[str], Backend],
        addresses: Collection[str],
        timing: WatchTiming,
        chooser: Chooser,
        limits: HealthLimits = HealthLimits(),  # noqa: B008 -- frozen
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._backends: dict[str, Backend] = {}
        self._timing = timing
        self._chooser = chooser
        self._limits = limits
        self._clock = clock
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._on_change: list[Callable[[], None]] = []
        self._started = False
        self.apply(addresses)

    @property
    def backends(self) -> tuple[Backend, ...]:
        """In the order in which they were added; those that were removed until they are idle."""
        return tuple(self._backends.values())

    def start(self) -> None:
        """Begin to watch the backends."""
        self._started = True
        for backend in self.backends:
            self._watch(backend)

    async def close(self) -> None:
        for watcher in self._watchers.values():
            watcher.cancel()
        await asyncio.gather(*self._watchers.values(), *self._closing, return_exceptions=True)
        await asyncio.gather(*(backend.close() for backend in self.backends))

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every report of a backend, or its absence."""
        self._on_change.append(callback)

    def _announce(self) -> None:
        for callback in self._on_change:
            callback()

    # Which there are -----------------------------------------------------------------------------

    def apply(self, addresses: Collection[str]) -> None:
        """Let these be the backends from now on."""
        for address in addresses:
            backend = self._backends.get(address)
            if backend is None:
                self._add(address)
            elif backend.removed:
                backend.removed = False
                log.info("backend %s is listed again", address)
        for backend in self.backends:
            if backend.address not in addresses and not backend.removed:
                backend.removed = True
                log.info(
                    "backend %s is no longer listed; %d calls of it go on",
                    backend.address, backend.in_flight,
                )  # fmt: skip
                self._forget_idle(backend)
        self._announce()

    def _add(self, address: str) -> None:
        backend = self._backends[address] = self._make(address)
        backend.on_idle(lambda: self._forget_idle(backend))
        if self._started:
            log.info("backend %s is new", address)
            self._watch(backend)

    def _watch(self, backend: Backend) -> None:
        self._watchers[backend.address] = asyncio.create_task(
            watch(backend, self._timing, changed=self._announce, clock=self._clock),
            name=f"watch {backend.address}",
        )

    def _forget_idle(self, backend: Backend) -> None:
        if not backend.removed or backend.in_flight or backend.address not in self._backends:
            return
        del self._backends[backend.address]
        if watcher := self._watchers.pop(backend.address, None):
            watcher.cancel()
        if self._started:
            closing = asyncio.create_task(backend.close(), name=f"close {backend.address}")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._announce()

    # What is asked of them -----------------------------------------------------------------------

    def check_outliers(self) -> list[str]:
        """Leave out backends that fail too many of their calls; returns their addresses. To be
        called after such a failure."""
        by_health = {backend.health: backend for backend in self.backends}
        ejected = eject_outliers(list(by_health), self._clock(), self._limits)
        addresses = [by_health[health].address for health in ejected]
        for address in addresses:
            log.warning("backend %s fails too many of its calls: others are preferred", address)
        if addresses:
            self._announce()
        return addresses

    def get(self, address: str) -> Backend | None:
        return self._backends.get(address)

    def choose(
        self, keys: CallKeys, tried: Collection[str] = (), *, with_room: bool = False
    ) -> Backend | None:
        """The backend for the next call, None when there is none to try (with room in its queue, if
        need be). Raises ServiceError when no backend has the call's model."""
        now = self._clock()
        served = [(backend.models, backend.view(now)) for backend in self._backends.values()]
        address = self._chooser.choose(served, keys, tried, with_room=with_room)
        return None if address is None else self._backends[address]

    def room(self, waiting: int) -> float:
        """How many calls more the backends would take if each may have `waiting` in its queue;
        infinite when none is usable, which is for `choose` to say."""
        now = self._clock()
        views = (backend.view(now) for backend in self._backends.values())
        usable = (BackendState.UP, BackendState.SUSPECT)
        loads = [(view.load, view.own.unseen) for view in views if view.state in usable]
        if not loads:
            return float("inf")
        return sum(
            max(0.0, waiting - unseen - (load.waiting_requests if load else 0))
            for load, unseen in loads
        )

    def reachable(self) -> list[Backend]:
        """Backends that may hold live requests."""
        now = self._clock()
        return [b for b in self.backends if b.assess(now)[0] is not BackendState.DOWN]

    def usable(self) -> bool:
        """Whether a call would find a backend."""
        now = self._clock()
        states = (backend.assess(now)[0] for backend in self.backends)
        return any(state in (BackendState.UP, BackendState.SUSPECT) for state in states)

    def per_model(self) -> Sequence[Backend]:
        """One usable backend for each model that is served; one that has not said what it serves
        counts as serving a model of its own."""
        now = self._clock()
        found: dict[tuple[str, ...], Backend] = {}
        for backend in self.backends:
            if backend.assess(now)[0] in (BackendState.UP, BackendState.SUSPECT):
                found.setdefault(backend.models or (backend.address,), backend)
        return list(found.values())
