"""neo.v1.RouterService: what the router knows of its backends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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


def not_all_reset(done: Sequence[str], failed: Mapping[str, Failure]) -> ServiceError:
    """failed: by address, at least one. Its reason is the first one's; it names the failed ones
    before the others, since a long sentence is cut at its end."""
    reasons = [
        Reason(failure.reason) if failure.reason in Reason.__members__ else None
        for failure in failed.values()
    ]
    named = ", ".join(
        f"{address} ({reason or failure.code.name})"
        for (address, failure), reason in zip(failed.items(), reasons, strict=True)
    )
    return ServiceError(
        reasons[0] or Reason.BACKEND_LOST,
        f"{len(failed)} of {len(failed) + len(done)} prefix caches were not reset: {named}; "
        f"reset: {', '.join(done) or 'none'}",
    )


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
            await self._refuse(backend, Failure.of(error), context)
        return pb.DrainBackendResponse(live_requests=answer.live_requests)

    async def ResetBackendPrefixCache(
        self, request: pb.ResetBackendPrefixCacheRequest, context: Any
    ) -> Any:
        if request.address:
            backend = self._backend(request.address)
            if (failure := await self._reset(backend)) is not None:
                await self._refuse(backend, failure, context)
            return pb.ResetBackendPrefixCacheResponse(addresses=[backend.address])
        backends = list(self._registry.backends)
        outcomes = await asyncio.gather(*map(self._reset, backends))
        failed = {b.address: f for b, f in zip(backends, outcomes, strict=True) if f is not None}
        done = [b.address for b in backends if b.address not in failed]
        if failed:
            raise not_all_reset(done, failed)
        return pb.ResetBackendPrefixCacheResponse(addresses=done)

    async def _reset(self, backend: Backend) -> Failure | None:
        stub: Any = engine_pb2_grpc.EngineServiceStub(backend.channel)
        try:
            await stub.ResetPrefixCache(engine.ResetPrefixCacheRequest(), timeout=self._ask_seconds)
        except grpc.aio.AioRpcError as error:
            return Failure.of(error)
        return None

    def _backend(self, address: str) -> Backend:
        backend = self._registry.get(address)
        if backend is None:
            raise ServiceError(
                Reason.UNKNOWN_BACKEND, f"no backend {address!r} is configured", field="address"
            )
        return backend

    async def _refuse(self, backend: Backend, failure: Failure, context: Any) -> NoReturn:
        """In the backend's words, if it has any."""
        if not failure.unreachable:
            await failure.refuse(context)
        raise ServiceError(
            Reason.BACKEND_LOST, f"backend {backend.address} cannot be reached"
        ) from None
