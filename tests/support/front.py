"""A real router before scripted backends, and a client's view of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from neo_common.errors import ErrorDetails
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc, router_pb2, router_pb2_grpc
from router.app import Router, running
from router.config import RouterConfig
from router.relay import EOF
from router.views import BackendState
from tests.support.fake_backend import FakeBackend


class Front:
    """A running router and stubs for it."""

    def __init__(self, router: Router, channel: grpc.aio.Channel) -> None:
        self.router = router
        self.channel = channel
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        self.operator: Any = router_pb2_grpc.RouterServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    async def states(self, *wanted: BackendState) -> None:
        """Until the backends have these states, in order."""
        codes = [getattr(router_pb2, f"BACKEND_STATE_{state.name}") for state in wanted]
        call = self.operator.WatchBackends(router_pb2.WatchBackendsRequest(interval_ms=10))
        async with asyncio.timeout(10):
            async for message in call:
                if [backend.state for backend in message.backends] == codes:
                    break
        call.cancel()

    def watch_request(self, interval_ms: int) -> router_pb2.WatchBackendsRequest:
        return router_pb2.WatchBackendsRequest(interval_ms=interval_ms)

    async def until_health(self, status: int) -> None:
        call = self.health.Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(10):
            async for message in call:
                if message.status == status:
                    break
        call.cancel()

    async def text(self, **request: Any) -> str:
        texts = [
            delta.text
            async for message in self.inference.GenerateStream(
                inference.GenerateRequest(text="hi", **request), timeout=10
            )
            for delta in message.deltas
        ]
        return "".join(texts)


@asynccontextmanager
async def front(backends: list[FakeBackend], /, **settings: Any) -> AsyncIterator[Front]:
    """A router before `backends`, all of which are UP."""
    config = RouterConfig(
        listen="127.0.0.1:0",
        **{
            "backends": tuple(backend.address for backend in backends),
            # Tests look at single messages, and a loaded machine is a busy one.
            "max_join_ms": 0.0,
            "load_interval_ms": 20, "stale_seconds": 0.5, "silence_seconds": 1.0,
            "reconnect_seconds": 0.02, "max_reconnect_seconds": 0.1, "drain_grace_seconds": 2.0,
            **settings,
        },
    )  # fmt: skip
    async with (
        running(config) as router,
        grpc.aio.insecure_channel(
            router.server.address, options=(("grpc.use_local_subchannel_pool", 1),)
        ) as channel,
    ):
        ready = Front(router, channel)
        if backends:
            await ready.states(*[BackendState.UP] * len(backends))
        yield ready


async def rest(call: Any) -> list[Any]:
    """The messages that are left on a stream of which some were read."""
    messages = []
    while (message := await call.read()) is not EOF:
        messages.append(message)
    return messages


async def deltas_left(call: Any) -> int:
    """What `rest` holds, however a busy router joined it."""
    return sum(len(message.deltas) for message in await rest(call))


def details(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> ErrorDetails:
    return ErrorDetails(error.value)
