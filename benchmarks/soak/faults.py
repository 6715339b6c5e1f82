"""What goes wrong, and when: drawn from a seed, one after the other, each with its recovery."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.soak.fleet import LEASE_SECONDS, MODES, Fleet, Service, Unready
from benchmarks.soak.watch import core_of

EXCUSED_SECONDS = 5.0
"""After the fleet is healthy again: calls that met the fault may end that late."""
ORPHAN_SECONDS = 20.0
"""How long an engine core may outlive its front end."""


@dataclass
class Fault:
    """One that was injected; times in seconds since the start of the run."""

    kind: str
    begun: float
    hold_seconds: float
    healthy: float | None = None
    """When everything served again; None: not yet."""
    note: str = ""

    def on(self, begin: float, end: float) -> bool:
        over = self.healthy is None or begin < self.healthy + EXCUSED_SECONDS
        return over and self.begun <= end


@dataclass
class Faults:
    """Injects them into a fleet, all drawn from `seed`."""

    fleet: Fleet
    seed: int
    fail: Callable[[str, str], None]
    begun: float = field(default_factory=time.monotonic)
    log: list[Fault] = field(default_factory=list)
    _mode: int = 0

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self._kinds: list[tuple[str, Callable[[float], Awaitable[None]], float, float]] = [
            # kind, what does it, shortest and longest hold in seconds
            ("cpu-kill", self._cpu_kill, 0.0, 4.0),
            ("cpu-kill-beyond-lease", self._cpu_kill, LEASE_SECONDS + 2, LEASE_SECONDS + 6),
            ("cpu-stop", self._cpu_stop, 0.2, 5.0),
            ("cpu-stop-beyond-lease", self._cpu_stop, LEASE_SECONDS + 2, LEASE_SECONDS + 6),
            ("neighbour-cpu-stop", self._neighbour_stop, 0.1, 3.0),
            ("cpu-restart", self._cpu_restart, 0.0, 1.0),
            ("core-kill", self._core_kill, 0.0, 2.0),
            ("core-stop", self._core_stop, 0.5, 4.0),
            ("front-kill", self._front_kill, 0.0, 2.0),
            ("gpu-restart", self._gpu_restart, 0.0, 1.0),
            ("router-kill", self._router_kill, 0.0, 3.0),
            ("router-restart", self._router_restart, 0.0, 1.0),
            ("cpu-and-core-kill", self._cpu_and_core_kill, 0.0, 3.0),
        ]
        self._bag: list[int] = []

    def now(self) -> float:
        return time.monotonic() - self.begun

    def excuse(self, begin: float, end: float) -> bool:
        """Of the monotonic clock."""
        begin, end = begin - self.begun, end - self.begun
        return any(fault.on(begin, end) for fault in self.log)

    @property
    def calm(self) -> bool:
        now = self.now()
        return not any(fault.on(now, now) for fault in self.log)

    async def inject(self) -> Fault:
        """The next one; returns when the fleet is healthy again. Raises Unready."""
        if not self._bag:  # all kinds in a new order, so that none is rare
            self._bag = self._draw.sample(range(len(self._kinds)), len(self._kinds))
        kind, act, least, most = self._kinds[self._bag.pop()]
        fault = Fault(kind, self.now(), self._draw.uniform(least, most))
        self.log.append(fault)
        await act(fault.hold_seconds)
        await self.fleet.healthy()
        fault.healthy = self.now()
        fault.note = str(self.fleet.gpus[1].config["offload_mode"])
        return fault

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(fault) for fault in self.log]

    async def _cpu_kill(self, hold: float) -> None:
        await self._killed(self.fleet.cpus[0], hold)

    async def _killed(self, service: Service, hold: float) -> None:
        service.kill()
        await service.ended()
        await asyncio.sleep(hold)
        service.start()

    async def _cpu_stop(self, hold: float) -> None:
        await self._stopped(self.fleet.cpus[0], hold)

    async def _neighbour_stop(self, hold: float) -> None:
        await self._stopped(self.fleet.cpus[1], hold)

    async def _stopped(self, service: Service, hold: float) -> None:
        service.kill(signal.SIGSTOP)
        await asyncio.sleep(hold)
        service.kill(signal.SIGCONT)

    async def _cpu_restart(self, hold: float) -> None:
        await self._restarted(self.fleet.cpus[0], hold)

    async def _gpu_restart(self, hold: float) -> None:
        await self._restarted(self.fleet.gpus[1], hold)

    async def _router_restart(self, hold: float) -> None:
        await self._restarted(self.fleet.routers[1], hold)

    async def _restarted(self, service: Service, hold: float) -> None:
        service.kill(signal.SIGTERM)
        self._ended_with(service, await service.ended(), 0)
        await asyncio.sleep(hold)
        self._start(service)

    async def _router_kill(self, hold: float) -> None:
        await self._killed(self.fleet.routers[1], hold)

    async def _core_kill(self, hold: float) -> None:
        gpu = self.fleet.gpus[1]
        _signal(core_of(gpu.pid), signal.SIGKILL)
        self._ended_with(gpu, await gpu.ended(), 1)
        await asyncio.sleep(hold)
        self._start(gpu)

    async def _core_stop(self, hold: float) -> None:
        core = core_of(self.fleet.gpus[1].pid)
        _signal(core, signal.SIGSTOP)
        await asyncio.sleep(hold)
        _signal(core, signal.SIGCONT)

    async def _front_kill(self, hold: float) -> None:
        gpu = self.fleet.gpus[1]
        core = core_of(gpu.pid)
        gpu.kill()
        await gpu.ended()
        if core is not None:
            await self._orphan_ends(core)
        await asyncio.sleep(hold)
        self._start(gpu)

    async def _cpu_and_core_kill(self, hold: float) -> None:
        cpu = self.fleet.cpus[0]
        cpu.kill()
        await cpu.ended()
        await self._core_kill(hold)
        cpu.start()

    def _start(self, service: Service) -> None:
        if service is self.fleet.gpus[1]:
            self._mode += 1
            service.config["offload_mode"] = MODES[self._mode % len(MODES)]
        service.start()

    def _ended_with(self, service: Service, code: int, wanted: int) -> None:
        if code != wanted:
            self.fail("exit", f"{service.name} ended with {code}, not {wanted}")

    async def _orphan_ends(self, core: int) -> None:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while os.path.exists(f"/proc/{core}"):  # noqa: ASYNC240 -- no disk
            if time.monotonic() > deadline:
                self.fail("orphan", "an engine core outlives its front end")
                _signal(core, signal.SIGKILL)
                return
            await asyncio.sleep(0.1)  # not our child: there is nothing to wait on


def _signal(pid: int | None, number: signal.Signals) -> None:
    if pid is None:
        raise Unready("a gpu_service has no engine core")
    os.kill(pid, number)
