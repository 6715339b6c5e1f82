"""A peer that is silent is told from one that has gone, in the time that was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from neo_common.grpc.keepalive import Options, keepalive
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc
from tests.support.fake_backend import FakeBackend
from tests.support.wire import wire

PATIENT = ("grpc.http2.min_ping_interval_without_data_ms", 200)
SECONDS = 30.0
"""gRPC's own time-out, 60 s, must not be what ends it."""


@asynccontextmanager
async def served(backend: FakeBackend, options: Options) -> AsyncIterator[str]:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0), PATIENT, *options))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(backend, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_gone_peer_is_found_on_a_silent_stream(side: str) -> None:
    """Also after more silence than gRPC has pings for by default."""
    ours = keepalive(1.0, 1.0)
    backend = FakeBackend("a", hold=asyncio.Event())
    local = ("grpc.use_local_subchannel_pool", 1)
    async with (
        served(backend, ours if side == "server" else ()) as address,
        wire(address) as between,
        grpc.aio.insecure_channel(
            between.address, options=(local, *(ours if side == "client" else ()))
        ) as channel,
    ):
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.GenerateStream(inference.GenerateRequest(text="hi"))
        await call.read()
        silence = asyncio.create_task(call.read())
        found = silence if side == "client" else asyncio.create_task(backend.cancelled.wait())
        done, _ = await asyncio.wait([found], timeout=4.5)
        assert not done, "a silent peer is no gone one"
        between.stall()
        done, _ = await asyncio.wait([found], timeout=SECONDS)
        call.cancel()
        await asyncio.wait([silence])
        assert done, f"not found within {SECONDS:g} s"
        if side == "client":
            error: Any = found.exception()
            assert error.code() is grpc.StatusCode.UNAVAILABLE
