"""Keeps the three services running: start, restart of a dead cpu_service, stop in order.

start          cpu_service, gpu_service, router at once; each is ready by its own health check
a death        cpu_service: started again with the same settings, after a pause that doubles
               (the gpu_service keeps its memory and its requests meanwhile);
               another one, or a cpu_service that will not start: all stop, and it is said why
stop           router, gpu_service, cpu_service, each with SIGTERM and its own drain
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neo_client.local.child import Child, ChildFailed, Say, Service

RESTART_SECONDS = 0.1
MAX_RESTART_SECONDS = 5.0
SETTLED_SECONDS = 30.0
"""A cpu_service that lived this long is restarted without a pause worth speaking of again."""
MAX_FAILED_STARTS = 5
"""In a row, after which a restarted cpu_service is given up."""
STOP_MARGIN_SECONDS = 5.0
"""What a service may take beyond its drain grace before it is killed."""


@dataclass(frozen=True)
class StackPlan:
    """What to run. `cpu` is None without a host tier."""

    cpu: Service | None
    gpu: Service
    router: Service
    directory: Path
    """Holds configurations and sockets; private to the user."""
    grace_seconds: float
    """The services' own drain grace."""


class LocalStack:
    """Runs a plan; used by one event loop.

    stack = LocalStack(plan, say)
    await stack.start()             all are serving, or ChildFailed
    await stack.watch()             returns never; raises ChildFailed when one is lost
    await stack.stop()              in any case
    """

    def __init__(
        self, plan: StackPlan, say: Say, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plan = plan
        self._say = say
        self._clock = clock
        self._children: dict[str, Child] = {}

    def child(self, module: str) -> Child:
        return self._children[module]

    async def _spawn(self, service: Service) -> Child:
        child = await Child.start(service, self.plan.directory, self._say)
        self._children[service.module] = child
        return child

    async def start(self) -> None:
        """Until all three serve. Raises ChildFailed."""
        services = [s for s in (self.plan.cpu, self.plan.gpu, self.plan.router) if s is not None]
        children = [await self._spawn(service) for service in services]
        try:
            async with asyncio.TaskGroup() as group:
                for child in children:
                    group.create_task(child.wait_ready())
        except* ChildFailed as failures:
            raise failures.exceptions[0] from None

    async def watch(self) -> None:
        """Keep the cpu_service alive; raise ChildFailed when another service ends."""
        try:
            async with asyncio.TaskGroup() as group:
                for service in (self.plan.gpu, self.plan.router):
                    group.create_task(self._must_live(service.module))
                if self.plan.cpu is not None:
                    group.create_task(self._keep_alive(self.plan.cpu))
        except* ChildFailed as failures:
            raise failures.exceptions[0] from None

    async def _must_live(self, module: str) -> None:
        child = self._children[module]
        raise ChildFailed(child.describe_end(await child.ended()))

    async def _keep_alive(self, service: Service) -> None:
        pause, failed_starts = RESTART_SECONDS, 0
        while True:
            started = self._clock()
            child = self._children[service.module]
            end = child.describe_end(await child.ended())
            failed_starts = 0 if child.ready else failed_starts + 1
            if failed_starts == MAX_FAILED_STARTS:
                raise ChildFailed(end)
            if self._clock() - started > SETTLED_SECONDS:
                pause = RESTART_SECONDS
            self._say("neo", end.partition(":\n")[0] + "; starting it again")
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_RESTART_SECONDS)
            with contextlib.suppress(ChildFailed):  # the next turn finds its end
                await (await self._spawn(service)).wait_ready()
                self._say("neo", f"{service.module} serves again")

    async def stop(self) -> bool:
        """In order, each with its drain; True when all ended by themselves."""
        clean = True
        for module in ("router", "gpu_service", "cpu_service"):
            child = self._children.get(module)
            if child is not None:
                code = await child.stop(self.plan.grace_seconds + STOP_MARGIN_SECONDS)
                clean &= code == 0
        return clean

    def kill(self) -> None:
        """All, now."""
        for child in self._children.values():
            child.kill()
