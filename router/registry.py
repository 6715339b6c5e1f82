"""The router's backends together: a load watcher each, the choice for a call, word of changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence

from router.backend import Backend
from router.load import WatchTiming, watch
from router.policy import BackendState, choose


class Registry:
    """Owns the backends and their watchers between `start` and `close`; used by one event loop."""

    def __init__(
        self,
        backends: Sequence[Backend],
        timing: WatchTiming,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backends = tuple(backends)
        self._by_address = {backend.address: backend for backend in backends}
        self._timing = timing
        self._clock = clock
        self._turn = 0
        self._watchers: list[asyncio.Task[None]] = []
        self._on_change: list[Callable[[], None]] = []

    def start(self) -> None:
        self._watchers = [
            asyncio.create_task(
                watch(backend, self._timing, changed=self._announce, clock=self._clock),
                name=f"watch {backend.address}",
            )
            for backend in self.backends
        ]

    async def close(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(backend.close() for backend in self.backends))

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every report of a backend, or its absence."""
        self._on_change.append(callback)

    def _announce(self) -> None:
        for callback in self._on_change:
            callback()

    def get(self, address: str) -> Backend | None:
        return self._by_address.get(address)

    def choose(self, tried: Collection[str] = ()) -> Backend | None:
        """The backend for the next call, see `policy.choose`; ties go round."""
        now = self._clock()
        self._turn = (self._turn + 1) % max(1, len(self.backends))
        turned = self.backends[self._turn :] + self.backends[: self._turn]
        address = choose([backend.view(now) for backend in turned], tried)
        return None if address is None else self._by_address[address]

    def reachable(self) -> list[Backend]:
        """Backends that may hold live requests."""
        now = self._clock()
        return [b for b in self.backends if b.assess(now)[0] is not BackendState.DOWN]

    def usable(self) -> bool:
        """Whether a call would find a backend."""
        now = self._clock()
        states = (backend.assess(now)[0] for backend in self.backends)
        return any(state in (BackendState.UP, BackendState.SUSPECT) for state in states)
