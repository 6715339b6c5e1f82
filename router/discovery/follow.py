"""All entries of `backends` together: whoever finds addresses, the union is what there is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from router.discovery import dns, kubernetes
from router.discovery.targets import DnsTarget, StaticTarget, Target

log = logging.getLogger("router.discovery")


class Discovery:
    """Used by one event loop, between `start` and `stop`.

    api: how to reach Kubernetes' API server; None where no target needs it.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        dns_interval: float,
        api: kubernetes.ApiServer | None,
    ) -> None:
        self._targets = list(targets)
        self._dns_interval = dns_interval
        self._api = api
        self._found: list[frozenset[str]] = [
            frozenset((t.address,)) if isinstance(t, StaticTarget) else frozenset() for t in targets
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self._changed: Callable[[list[str]], None] = lambda addresses: None

    @property
    def addresses(self) -> list[str]:
        """Those known now; in the order of the targets, then sorted."""
        return list(dict.fromkeys(a for each in self._found for a in sorted(each)))

    def start(self, changed: Callable[[list[str]], None]) -> None:
        """changed: told all addresses whenever they have changed."""
        self._changed = changed
        for number, target in enumerate(self._targets):
            follow = self._follow(number, target)
            if follow is not None:
                self._tasks.append(asyncio.create_task(follow, name=f"follow {target}"))

    def _follow(self, number: int, target: Target) -> Coroutine[Any, Any, None] | None:
        found = partial(self._take, number)
        if isinstance(target, StaticTarget):
            return None
        if isinstance(target, DnsTarget):
            return dns.follow(target, self._dns_interval, found)
        assert self._api is not None
        return kubernetes.follow(target, self._api, found)

    def _take(self, number: int, addresses: frozenset[str]) -> None:
        if addresses == self._found[number]:
            return
        self._found[number] = addresses
        log.info("%s: %d backends", self._targets[number], len(addresses))
        self._changed(self.addresses)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
