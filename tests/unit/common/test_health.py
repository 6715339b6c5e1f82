"""What probes of a real server are told, on its port and on the one for health alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from neo_common.grpc.health import HOST_TIER, LIVENESS, READINESS
from neo_common.grpc.server import ServiceServer
from neo_common.grpc.settings import ListenSettings
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import inference_pb2_grpc as pb_grpc
from tests.support.credentials import Authority

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
READY_NAMES = ("", READINESS, SERVICE.full_name)


@asynccontextmanager
async def started(settings: ListenSettings) -> AsyncIterator[ServiceServer]:
    server = ServiceServer(
        "127.0.0.1:0", [SERVICE], settings=replace(settings, health_listen="127.0.0.1:0")
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def said(address: str, name: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
    return int(answer.status)


async def test_readiness_comes_and_goes_and_liveness_stays() -> None:
    async with started(ListenSettings()) as server:
        assert server.health_address not in ("", server.address)
        for address in (server.address, server.health_address):
            assert {await said(address, name) for name in READY_NAMES} == {NOT_SERVING}
            assert await said(address, LIVENESS) == SERVING
        await server.set_serving(True)
        for address in (server.address, server.health_address):
            assert {await said(address, name) for name in (*READY_NAMES, LIVENESS)} == {SERVING}
        server.begin_drain()
        await server.set_serving(False)
        assert await said(server.health_address, READINESS) == NOT_SERVING
        assert await said(server.health_address, LIVENESS) == SERVING


async def test_the_port_for_health_serves_nothing_else() -> None:
    async with started(ListenSettings()) as server:
        async with grpc.aio.insecure_channel(server.health_address) as channel:
            stub = pb_grpc.InferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Tokenize(pb.TokenizeRequest(text="x"), timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # a name that nobody set
            await said(server.health_address, HOST_TIER)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_probe_needs_neither_tls_nor_credentials(tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path).issue("server", "127.0.0.1")
    settings = ListenSettings(tls_cert=certificate, tls_key=key)
    async with started(settings) as server:
        assert await said(server.health_address, LIVENESS) == SERVING
        with pytest.raises(grpc.aio.AioRpcError):
            await said(server.address, LIVENESS)


async def test_an_address_that_cannot_be_used_is_named() -> None:
    server = ServiceServer(
        "127.0.0.1:0", [SERVICE], settings=ListenSettings(health_listen="nowhere")
    )
    with pytest.raises(ValueError, match="health_listen"):
        await server.start()
    await server.stop()
