"""Keeps one WatchLoad stream open to each backend, for ever, with backoff."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import engine_pb2_grpc
from router.backend import Backend
from router.relay import EOF

log = logging.getLogger("router.load")
T = TypeVar("T")


@dataclass(frozen=True)
class WatchTiming:
    interval_ms: int
    """Between snapshots."""
    silence_seconds: float
    """A stream that says nothing for this long is given up and opened again."""
    backoff_seconds: float
    """After the first failure; doubles up to `max_backoff_seconds`, with jitter of a quarter."""
    max_backoff_seconds: float


async def watch(
    backend: Backend,
    timing: WatchTiming,
    *,
    changed: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Feed `backend` with snapshots until cancelled. `changed` is called after every news of it."""
    failures = 0
    while True:
        try:
            async for load in _snapshots(backend, timing):
                if failures or not backend.load:
                    log.info("backend %s reports its load", backend.address)
                failures = 0
                backend.snapshot(load, clock())
                changed()
            problem = "ended its load stream"
        except TimeoutError:
            problem = f"no load report for {timing.silence_seconds:g} s"
        except grpc.aio.AioRpcError as error:
            problem = f"{error.code().name}: {error.details()}"
        backend.watch_failed(problem)
        changed()
        if failures == 0 and backend.load is None:
            log.info("waiting for backend %s", backend.address)
        elif failures == 0:
            log.warning("backend %s: %s", backend.address, problem)
        backoff = min(timing.backoff_seconds * 2.0 ** min(failures, 16), timing.max_backoff_seconds)
        failures += 1
        await asyncio.sleep(backoff * random.uniform(0.75, 1.25))


async def _snapshots(backend: Backend, timing: WatchTiming) -> AsyncGenerator[engine.LoadSnapshot]:
    stub = engine_pb2_grpc.EngineServiceStub(backend.channel)
    call = stub.WatchLoad(engine.WatchLoadRequest(interval_ms=timing.interval_ms))
    try:
        while True:
            response = await heard(call.read(), timing.silence_seconds)
            if response is EOF:
                return
            yield response.load
    finally:
        call.cancel()


async def heard(read: Coroutine[Any, Any, T], seconds: float) -> T:
    """What `read` returns; TimeoutError when it takes longer.

    Where it was our own loop that was held up, by thousands of calls that end at once, what came
    meanwhile is there, but not taken in yet: all backends would be lost at that moment.
    """
    reading = asyncio.ensure_future(read)
    try:
        for patience in (seconds, seconds / 5):
            if (await asyncio.wait({reading}, timeout=patience))[0]:
                return reading.result()
        raise TimeoutError
    finally:
        reading.cancel()
