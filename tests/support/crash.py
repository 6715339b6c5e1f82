"""A whole system to break: two engines on one cpu_service, a router in front of the first engine;
how to bring it to a moment, break one process of it there, and see that nothing is left behind.

    client -> router -> engine (front end, core) --\\
    client -----------> neighbour ------------------ cpu_service
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import grpc
import grpc.aio
from prometheus_client.parser import text_string_to_metric_families

from protos.neo.v1 import engine_pb2, router_pb2, router_pb2_grpc, types_pb2
from tests.support.census import holdings
from tests.support.load import Answer, Job, Stream, assert_idle_and_whole, run_job, watch_load
from tests.support.processes import descendants, parents, suspend, wait_gone
from tests.support.stack import Service, Stack, free_port, running_stack

WAIT_SECONDS = 240.0
"""For whatever takes as long as the machine takes."""

SETTLE_SECONDS = 20.0
"""Until all that is given back is given back."""


class Who(StrEnum):
    ROUTER = "router"
    FRONT = "front"
    CORE = "core"
    CPU = "cpu"


class When(StrEnum):
    IDLE = "idle"
    PREFILL = "prefill"
    DECODE = "decode"
    MIGRATION = "migration"
    DRAIN = "drain"


HOST, GPU = types_pb2.PLACEMENT_CPU_PREFERRED, types_pb2.PLACEMENT_GPU_ONLY
OUTPUT = 600
"""Long enough that requests are under way when they are looked at, however slowly that goes."""
SHORT_OUTPUT = 24
CHUNK_TOKENS = 16
"""Of the engine's iterations: long prompts then take long enough to be met half-way."""
JOBS = {
    "host": Job(tuple(range(3, 40)), OUTPUT, placement=HOST),
    "host 2": Job(tuple(range(5, 60)), OUTPUT, placement=HOST),
    "gpu": Job(tuple(range(7, 50)), OUTPUT, placement=GPU),
    "host prompt": Job(tuple(3 + 7 * i % 90 for i in range(2400)), SHORT_OUTPUT, placement=HOST),
    "host short": Job(tuple(range(9, 30)), SHORT_OUTPUT, placement=HOST),
    "gpu short": Job(tuple(range(11, 30)), SHORT_OUTPUT, placement=GPU),
    "gpu prompt": Job(tuple(3 + 11 * i % 90 for i in range(2400)), SHORT_OUTPUT, placement=GPU),
}
Census = dict[str, Counter[str]]
"""By process; see `holdings`."""


@dataclass
class System:
    stack: Stack
    neighbour: Service
    salts: Iterator[int]
    asked_tokens: int = 0
    """In prompts that went to the router."""
    baseline: Census = field(default_factory=dict)
    """What everybody holds when all has been used once."""

    @property
    def engine(self) -> Service:
        return self.stack.gpu

    @property
    def services(self) -> list[Service]:
        return [self.stack.cpu, self.engine, self.neighbour, self.stack.router]

    def service(self, who: Who) -> Service:
        """The one that a supervisor starts again when `who` has died."""
        return {Who.ROUTER: self.stack.router, Who.CPU: self.stack.cpu}.get(who, self.engine)

    def pid(self, who: Who) -> int:
        service = self.service(who)
        assert service.process is not None
        return core_of(service) if who is Who.CORE else service.process.pid

    def stream(
        self, name: str, service: Service | None = None, seconds: float = WAIT_SECONDS
    ) -> Stream:
        """By the router, unless it says to whom. It shares no KV with any request before."""
        job = replace(JOBS[name], salt=str(next(self.salts)))
        if service is None:
            self.asked_tokens += len(job.prompt)
        return Stream((service or self.stack.router).address, job, seconds)

    async def ready(self) -> None:
        """Start what is down, and wait until everybody sees everybody."""
        for service in self.services:
            if service.process is None or service.process.poll() is not None:
                service.start()
        for service in self.services:
            await asyncio.to_thread(service.wait_serving)
        await self.until_backend(router_pb2.BACKEND_STATE_UP)
        for engine in (self.engine, self.neighbour):
            await until_load(engine, _is_up)

    async def until_backend(self, state: router_pb2.BackendState) -> None:
        """Until the router has that opinion of the engine."""
        address = self.stack.router.address
        async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(WAIT_SECONDS):
            call = router_pb2_grpc.RouterServiceStub(channel).WatchBackends(
                router_pb2.WatchBackendsRequest(interval_ms=20)
            )
            async for message in call:
                if [backend.state for backend in message.backends] == [state]:
                    return

    async def settle(self, baseline: Census | None = None) -> Census:
        """What everybody holds once nothing runs; fails where that stays more than `baseline`."""
        for engine in (self.engine, self.neighbour):
            await assert_idle_and_whole(engine.address, WAIT_SECONDS)
        give_up = time.monotonic() + SETTLE_SECONDS
        async for _ in watch_load(self.engine.address, interval_ms=100, seconds=WAIT_SECONDS):
            held = self.census()
            surplus = {} if baseline is None else more_than(baseline, held)
            if not surplus:
                return held
            assert time.monotonic() < give_up, f"not given back: {surplus}"
        raise AssertionError("the load stream ended")

    async def provoke(self, who: Who, pid: int) -> None:
        """Have a process take memory until it is killed for that."""
        async with asyncio.timeout(WAIT_SECONDS):
            while pid in parents():
                if who is Who.CORE:
                    await run_job(self.engine.address, Job((3, 4), 1), 5.0)
                    continue
                host, _, port = self.service(who).address.rpartition(":")
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(host, int(port))
                    writer.close()

    def census(self) -> dict[str, Counter[str]]:
        held = {who.value: holdings(self.pid(who)) for who in Who}
        assert self.neighbour.process is not None
        held["neighbour"] = holdings(self.neighbour.process.pid)
        held["neighbour's core"] = holdings(core_of(self.neighbour))
        held["sessions"] = Counter(
            {name: round(metric(self.stack.cpu, name)) for name in SESSION_METRICS}
        )
        return held


SESSION_METRICS = ("neo_host_sessions", "neo_host_pool_bytes", "neo_host_backlog_layers")


def more_than(baseline: Census, held: Census) -> dict[str, dict[str, tuple[int, int]]]:
    """What differs, as (then, now); fewer descriptors are no harm."""
    return {
        process: different
        for process, now in held.items()
        if (
            different := {
                kind: (baseline[process][kind], now[kind])
                for kind in now.keys() | baseline[process].keys()
                if now[kind] > baseline[process][kind]
                or (now[kind] < baseline[process][kind] and not kind.startswith("fd "))
            }
        )
    }


def core_of(service: Service) -> int:
    """The process of a gpu_service's engine core."""
    assert service.process is not None
    (core,) = descendants(service.process.pid)
    return core


def metric(service: Service, name: str, **labels: str) -> float:
    """The sum of a metric's series that bear these labels."""
    url = f"http://127.0.0.1:{service.config['metrics_port']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def _is_up(load: engine_pb2.LoadSnapshot) -> bool:
    return load.host_tier_state == engine_pb2.HOST_TIER_STATE_UP


def live_requests(load: engine_pb2.LoadSnapshot) -> int:
    return load.waiting_requests + load.gpu.running_requests + load.host.running_requests


async def until_load(
    engine: Service, reached: Callable[[engine_pb2.LoadSnapshot], bool]
) -> engine_pb2.LoadSnapshot:
    async for load in watch_load(engine.address, interval_ms=10, seconds=WAIT_SECONDS):
        if reached(load):
            return load
    raise AssertionError("the load stream ended")


async def bring_to(
    system: System, when: When, who: Who, late_seconds: float | None = None
) -> dict[str, Stream]:
    """Streams that are at that moment, by their names; one of the neighbour's, too, and "late", if
    asked for: a call with that deadline."""
    streams = {}
    if when is not When.IDLE:
        beside = system.stream("host", system.neighbour)
        await beside.until(1)
        under_way = _prefilling if when is When.PREFILL else _decoding
        streams = {**await under_way(system, when is When.MIGRATION), "beside": beside}
    if late_seconds is not None:
        others = len(streams.keys() - {"beside"})
        streams["late"] = system.stream("host", seconds=late_seconds)
        await until_load(system.engine, lambda load: live_requests(load) > others)
    if when is When.DRAIN:
        await _drain(system, who)
    return streams


async def _decoding(system: System, migrating: bool) -> dict[str, Stream]:
    """Tokens have come, and most have not; tried again where this process was too slow."""
    for _ in range(10):
        before = await until_load(system.engine, lambda load: True)
        moved = before.demotions_total + before.promotions_total + 4
        streams = {name: system.stream(name) for name in ("host", "host 2", "gpu")}
        for stream in streams.values():
            await stream.until(2)
        if migrating:
            await until_load(
                system.engine,
                lambda load, most=moved: load.demotions_total + load.promotions_total > most,
            )
        if all(stream.tokens < OUTPUT // 2 for stream in streams.values()):
            return streams
        for stream in streams.values():
            await stream.task
    raise AssertionError("the outputs are too short")


async def _prefilling(system: System, _: bool) -> dict[str, Stream]:
    """A prompt that is being computed on the host tier now, and one behind it; tried again where
    this process was too slow to see it."""
    for _ in range(10):
        before = await until_load(system.engine, lambda load: True)
        first = system.stream("host prompt")
        await until_load(
            system.engine,
            lambda load, start=before.iterations_total, first=first: (
                (load.host.running_requests == 1 and load.iterations_total > start)
                or first.tokens > 0
            ),
        )
        second = system.stream("gpu prompt")
        await until_load(
            system.engine,
            lambda load, first=first: (
                load.waiting_requests + load.gpu.running_requests == 1 or first.tokens > 0
            ),
        )
        if not first.tokens:
            return {"host prompt": first, "gpu prompt": second}
        await asyncio.gather(first.task, second.task)
    raise AssertionError("the prompts are too short")


async def _drain(system: System, who: Who) -> None:
    """The router where it is to be hit itself, else the engine."""
    draining = system.stack.router if who is Who.ROUTER else system.engine
    draining.signal(signal.SIGTERM)
    if who is Who.ROUTER:
        refused = await until_refused(draining.address)
        assert refused.reason == "DRAINING"
    else:
        state = engine_pb2.ENGINE_STATE_DRAINING
        await until_load(system.engine, lambda load: load.state == state)


async def until_refused(address: str) -> Answer:
    """The first new call that is not served any more."""
    async with asyncio.timeout(WAIT_SECONDS):
        while (answer := await run_job(address, Job((3, 4), 1))).error is None:
            pass
    return answer


def strike(system: System, who: Who, number: signal.Signals) -> None:
    """Send it; SIGSTOP has taken effect on return, SIGKILL has ended the process."""
    pid = system.pid(who)
    if number is signal.SIGSTOP:
        suspend(pid)
        return
    os.kill(pid, number)
    if number is signal.SIGKILL:
        wait_gone({pid})


@contextmanager
def running_system(directory: Path, model: Path, **gpu_config: object) -> Iterator[System]:
    more = {
        "cpu_service": {"metrics_port": free_port(), "drain_grace_seconds": 2.0},
        "gpu_service": {"metrics_port": free_port(), "drain_grace_seconds": WAIT_SECONDS},
        "router": {"drain_grace_seconds": WAIT_SECONDS},
    }
    config = {
        "max_batch_tokens": CHUNK_TOKENS, "max_context_tokens": 4096, "log_level": "info",
        "profile_dir": str(directory / "profiles"), **gpu_config,
    }  # fmt: skip
    with running_stack(directory, model, more=more, **config) as stack:
        beside = {"listen": f"127.0.0.1:{free_port()}", "metrics_port": free_port()}
        (directory / "neighbour").mkdir()
        neighbour = Service(
            "gpu_service", str(beside["listen"]), {**stack.gpu.config, **beside},
            directory / "neighbour",
        )  # fmt: skip
        neighbour.start()
        try:
            neighbour.wait_serving()
            yield System(stack, neighbour, iter(range(10**6)))
        finally:
            neighbour.stop()
