"""A fake gpu_service behind the server that the real one has, and routers in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from neo_common.grpc.server import ServiceServer
from neo_common.grpc.settings import ListenSettings
from protos.neo.v1 import engine_pb2, engine_pb2_grpc, inference_pb2, inference_pb2_grpc
from router.app import Router
from tests.support.fake_backend import FakeBackend

SERVICES = [
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    engine_pb2.DESCRIPTOR.services_by_name["EngineService"],
]
FAST: dict[str, Any] = {
    "listen": "127.0.0.1:0", "load_interval_ms": 20, "reconnect_seconds": 0.02,
    "max_reconnect_seconds": 0.1, "drain_grace_seconds": 2.0,
}  # fmt: skip


@dataclass
class SecuredBackend(FakeBackend):
    server: ServiceServer = field(init=False)


@asynccontextmanager
async def backend(settings: ListenSettings, **named: Any) -> AsyncIterator[SecuredBackend]:
    """A fake gpu_service behind the server that the real one has."""
    fake = SecuredBackend("a", **named)
    server = fake.server = ServiceServer("127.0.0.1:0", SERVICES, settings=settings)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(fake, server.grpc)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(fake, server.grpc)
    fake.address = await server.start()
    await server.set_serving(True)
    try:
        yield fake
    finally:
        await server.stop()


async def usable(router: Router) -> None:
    """Until a backend can take calls."""
    news = asyncio.Event()
    router.registry.on_change(news.set)
    async with asyncio.timeout(20):
        while not router.registry.usable():
            news.clear()
            await news.wait()
