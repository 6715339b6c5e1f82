"""neo.v1.RouterService: what the router knows of its backends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from neo_common.errors import Reason, ServiceError
from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import engine_pb2_grpc, router_pb2_grpc
from protos.neo.v1 import router_pb2 as pb
from router.backend import Backend
from router.registry import Registry
from router.relay import Failure
from router.views import BackendState

DEFAULT_INTERVAL_MS = 500
MIN_INTERVAL_MS = 10
MAX_INTERVAL_MS = 60_000

STATES = {
    BackendState.UP: pb.BACKEND_STATE_UP,
    BackendState.SUSPECT: pb.BACKEND_STATE_SUSPECT,
    BackendState.DOWN: pb.BACKEND_STATE_DOWN,
    BackendState.DRAINING: pb.BACKEND_STATE_DRAINING,
}


def describe(backend: Backend, now: float) -> pb.Backend:
    state, problem = backend.assess(now)
    message = pb.Backend(
        address=backend.address,
        state=STATES[state],
        in_flight=backend.in_flight,
        calls_total=backend.calls_total,
        failures_total=backend.failures_total,
        problem=problem,
    )
    if backend.load is not None:
        message.load.CopyFrom(backend.load)
        message.load_age_seconds = now - backend.load_at
    return message


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    def __init__(
        self,
        registry: Registry,
        drain_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._drain_seconds = drain_seconds
        self._clock = clock

    def _backends(self) -> list[pb.Backend]:
        now = self._clock()
        return [describe(backend, now) for backend in self._registry.backends]

    async def ListBackends(self, request: pb.ListBackendsRequest, context: Any) -> Any:
        return pb.ListBackendsResponse(backends=self._backends())

    async def WatchBackends(
        self, request: pb.WatchBackendsRequest, context: Any
    ) -> AsyncIterator[pb.WatchBackendsResponse]:
        interval_ms = request.interval_ms or DEFAULT_INTERVAL_MS
        if not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
            raise ServiceError(
                Reason.INVALID_ARGUMENT,
                f"interval_ms is {interval_ms}, not 0 or {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS}",
                field="interval_ms",
            )
        while True:
            yield pb.WatchBackendsResponse(backends=self._backends())
            await asyncio.sleep(interval_ms / 1000)

    async def DrainBackend(self, request: pb.DrainBackendRequest, context: Any) -> Any:
        backend = self._registry.get(request.address)
        if backend is None:
            raise ServiceError(
                Reason.UNKNOWN_BACKEND,
                f"no backend {request.address!r} is configured",
                field="address",
            )
        stub = engine_pb2_grpc.EngineServiceStub(backend.channel)
        try:
            answer = await stub.Drain(engine.DrainRequest(), timeout=self._drain_seconds)
        except grpc.aio.AioRpcError as error:
            failure = Failure.of(error)
            if not failure.unreachable:
                await failure.refuse(context)
            raise ServiceError(
                Reason.BACKEND_LOST, f"backend {request.address} cannot be reached"
            ) from None
        return pb.DrainBackendResponse(live_requests=answer.live_requests)
