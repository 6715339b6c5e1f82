"""The processes of a soak: two routers, two gpu_services, a cpu_service for each.

    routers.0  steady               routers.1  killed, restarted
    gpus.0     steady, mode auto    gpus.1     killed, drained, restarted in another mode each time
    cpus.0     killed, stopped      cpus.1     steady, stopped for a moment

Leaks around a fault show in the process beside it, which stays.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.stack import free_port
from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import engine_pb2_grpc, router_pb2, router_pb2_grpc

READY_SECONDS = 180.0
STOP_SECONDS = 60.0
LEASE_SECONDS = 10.0
MODES = ("inline", "deferred", "asymmetric", "auto")
"""Of gpus.1, one after the other."""


class Unready(Exception):
    """Something did not come up, or did not end; the message has the end of its log."""


@dataclass
class Service:
    """A child process that can be started again at the same address."""

    name: str
    module: str
    config: dict[str, Any]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    @property
    def address(self) -> str:
        return str(self.config["listen"])

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        assert not self.alive
        path = self.folder / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(self.config))
        with (self.folder / f"{self.name}.{self.starts}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, "--config", str(path)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.starts += 1

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.alive:
            assert self.process is not None
            self.process.send_signal(number)

    async def ended(self, seconds: float = STOP_SECONDS) -> int:
        """Its exit code. Raises Unready when it goes on."""
        assert self.process is not None
        try:
            return await asyncio.to_thread(self.process.wait, seconds)
        except subprocess.TimeoutExpired:
            raise Unready(f"{self.name} does not end:\n{self.last_words()}") from None

    def last_words(self) -> str:
        """Of this start and the one before."""
        words = []
        for start in range(max(0, self.starts - 2), self.starts):
            text = (self.folder / f"{self.name}.{start}.log").read_text(errors="replace")
            words.append("\n".join(text.splitlines()[-20:]))
        return "\n".join(words)

    async def serving(self) -> None:
        """Until its health says so. Raises Unready."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + READY_SECONDS
        while loop.time() < deadline and self.alive:
            # A channel of its own for each try: one that met a closed port backs off for long.
            options = (("grpc.use_local_subchannel_pool", 1),)
            async with grpc.aio.insecure_channel(self.address, options=options) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                try:
                    async with asyncio.timeout(READY_SECONDS):
                        call = stub.Watch(health_pb2.HealthCheckRequest())
                        async for answer in call:
                            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                                return
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.2)  # refused: there is nothing yet to wait on
                except TimeoutError:
                    break
        raise Unready(f"{self.name} does not serve:\n{self.last_words()}")


@dataclass
class Fleet:
    routers: list[Service]
    gpus: list[Service]
    cpus: list[Service]

    @property
    def services(self) -> list[Service]:
        return [*self.cpus, *self.gpus, *self.routers]

    @property
    def address(self) -> str:
        """Of all routers, for one client."""
        return ",".join(router.address for router in self.routers)

    async def healthy(self) -> None:
        """Until everything serves, host tiers are up and routers use every backend. Raises
        Unready."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                for service in self.services:
                    await service.serving()
                for gpu in self.gpus:
                    await _host_tier_up(gpu)
                for router in self.routers:
                    await _backends_up(router, len(self.gpus))
        except TimeoutError:
            raise Unready("the fleet does not become healthy") from None
        except grpc.aio.AioRpcError as error:
            raise Unready(f"the fleet does not become healthy: {error.details()}") from None

    async def idle_blocks(self, seconds: float) -> dict[str, int]:
        """`gpus.0/gpu` -> blocks in use once nothing runs; what is there after `seconds` else."""
        found: dict[str, int] = {}
        for gpu in self.gpus:
            load = await _until_idle(gpu, seconds)
            for tier in ("gpu", "host"):
                blocks = getattr(load, tier)
                found[f"{gpu.name}/{tier}"] = blocks.total_blocks - blocks.free_blocks
        return found


async def _host_tier_up(gpu: Service) -> None:
    async with watch_load(gpu) as loads:
        async for load in loads:
            if load.host_tier_state == engine.HOST_TIER_STATE_UP:
                return


async def _backends_up(router: Service, count: int) -> None:
    up = [router_pb2.BACKEND_STATE_UP] * count
    async with grpc.aio.insecure_channel(router.address) as channel:
        stub: Any = router_pb2_grpc.RouterServiceStub(channel)
        async for message in stub.WatchBackends(router_pb2.WatchBackendsRequest(interval_ms=100)):
            if [backend.state for backend in message.backends] == up:
                return


async def _until_idle(gpu: Service, seconds: float) -> engine.LoadSnapshot:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    async with watch_load(gpu) as loads:
        async for load in loads:
            used = load.gpu.total_blocks - load.gpu.free_blocks
            used += load.host.total_blocks - load.host.free_blocks
            used += load.waiting_requests + load.gpu.running_requests + load.host.running_requests
            if not used or loop.time() > deadline:
                return load
    raise Unready(f"{gpu.name} ended its load stream")


@asynccontextmanager
async def watch_load(gpu: Service) -> AsyncIterator[AsyncIterator[engine.LoadSnapshot]]:
    async with grpc.aio.insecure_channel(gpu.address) as channel:
        stub: Any = engine_pb2_grpc.EngineServiceStub(channel)
        call = stub.WatchLoad(engine.WatchLoadRequest(interval_ms=100))

        async def loads() -> AsyncIterator[engine.LoadSnapshot]:
            async for message in call:
                yield message.load

        try:
            yield loads()
        finally:
            call.cancel()


@asynccontextmanager
async def running_fleet(folder: Path, model: Path) -> AsyncIterator[Fleet]:
    """All started and healthy; ended in the end. Raises Unready."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    fleet = _configured(folder, model)
    try:
        for service in fleet.services:
            service.start()
        await fleet.healthy()
        yield fleet
    finally:
        for service in reversed(fleet.services):
            service.kill(signal.SIGCONT)
            service.kill(signal.SIGTERM)
        for service in fleet.services:
            if service.process is not None:
                try:
                    await service.ended()
                except Unready:
                    service.kill()
                    raise


def _configured(folder: Path, model: Path) -> Fleet:
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)

    def service(name: str, module: str, **config: object) -> Service:
        config = {"listen": f"127.0.0.1:{free_port()}", "log_level": "info", **config}
        return Service(name, module, config, folder)

    cpus = [
        service(
            f"cpus.{number}", "cpu_service", runtime_dir=str(runtime / str(number)), threads=1,
            drain_grace_seconds=15.0,
        )
        for number in range(2)
    ]  # fmt: skip
    for number in range(2):
        (runtime / str(number)).mkdir(mode=0o700)
    gpus = [
        service(
            f"gpus.{number}", "gpu_service", model=str(model), device="cpu", dtype="float32",
            threads=1, cpu_services=[cpu.address], gpu_kv_blocks=96, host_kv_gib=0.004,
            offload_mode=MODES[-1 - number], force_migration_every=7,
            lease_seconds=LEASE_SECONDS, sweep_deadline_ms=1000.0, max_running_requests=24,
            max_waiting_requests=96, drain_grace_seconds=10.0, served_model_name="soak",
            profile_dir=str(folder / "profiles"),
        )
        for number, cpu in enumerate(cpus)
    ]  # fmt: skip
    routers = [
        service(
            f"routers.{number}", "router", backends=[gpu.address for gpu in gpus],
            http_listen=f"127.0.0.1:{free_port()}", drain_grace_seconds=15.0,
        )
        for number in range(2)
    ]  # fmt: skip
    return Fleet(routers, gpus, cpus)
