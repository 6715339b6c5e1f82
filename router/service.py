"""neo.v1.RouterService: what the router knows of its backends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

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
        ask_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """ask_seconds: how long a backend may take to answer an operator."""
        self._registry = registry
        self._ask_seconds = ask_seconds
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
        backend = self._backend(request.address)
        stub: Any = engine_pb2_grpc.EngineServiceStub(backend.channel)
        try:
            answer = await stub.Drain(engine.DrainRequest(), timeout=self._ask_seconds)
        except grpc.aio.AioRpcError as error:
            await self._refuse(backend, error, context)
        return pb.DrainBackendResponse(live_requests=answer.live_requests)

    async def ResetBackendPrefixCache(
        self, request: pb.ResetBackendPrefixCacheRequest, context: Any
    ) -> Any:
        address = request.address
        backends = [self._backend(address)] if address else list(self._registry.backends)
        stubs: list[Any] = [engine_pb2_grpc.EngineServiceStub(b.channel) for b in backends]
        reset = engine.ResetPrefixCacheRequest()
        calls = [stub.ResetPrefixCache(reset, timeout=self._ask_seconds) for stub in stubs]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for backend, answer in zip(backends, answers, strict=True):
            if isinstance(answer, grpc.aio.AioRpcError):
                await self._refuse(backend, answer, context)
            if isinstance(answer, BaseException):
                raise answer
        return pb.ResetBackendPrefixCacheResponse(addresses=[b.address for b in backends])

    def _backend(self, address: str) -> Backend:
        backend = self._registry.get(address)
        if backend is None:
            raise ServiceError(
                Reason.UNKNOWN_BACKEND, f"no backend {address!r} is configured", field="address"
            )
        return backend

    async def _refuse(
        self, backend: Backend, error: grpc.aio.AioRpcError, context: Any
    ) -> NoReturn:
        """In the backend's words, if it has any."""
        failure = Failure.of(error)
        if not failure.unreachable:
            await failure.refuse(context)
        raise ServiceError(
            Reason.BACKEND_LOST, f"backend {backend.address} cannot be reached"
        ) from None
