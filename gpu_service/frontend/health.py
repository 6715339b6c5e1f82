"""What health says of a gpu_service beyond readiness: whether its engine gets on, and its host
tier."""

from __future__ import annotations

import asyncio
import logging

from gpu_service.frontend.dispatch import Dispatcher
from neo_common.grpc.health import HOST_TIER, LIVENESS, Health

CHECK_SECONDS = 1.0
_log = logging.getLogger(__name__)


class HealthReporter:
    """Runs beside the dispatcher once the engine is ready.

    stall_seconds: an engine that has requests and says nothing for longer is stuck (a hung GPU,
    say): it is not live, and whoever asks may start the process again; 0: it never is."""

    def __init__(self, health: Health, dispatcher: Dispatcher, stall_seconds: float) -> None:
        self._health = health
        self._dispatcher = dispatcher
        self._stall_seconds = stall_seconds
        self._live = True
        self._host_tier = ""

    async def run(self) -> None:
        while True:
            await self.report()
            await asyncio.sleep(CHECK_SECONDS)

    async def report(self) -> None:
        """Once; says only what has changed."""
        load = self._dispatcher.load
        if load is not None and load.host_tier_state not in ("off", self._host_tier):
            self._host_tier = load.host_tier_state
            await self._health.set(HOST_TIER, load.host_tier_state == "up")
        silent = self._dispatcher.silent_seconds()
        live = not self._stall_seconds or silent <= self._stall_seconds
        if live is not self._live:
            self._live = live
            await self._health.set(LIVENESS, live)
            if not live:
                _log.error("the engine core has requests, but has said nothing for %.0f s", silent)
