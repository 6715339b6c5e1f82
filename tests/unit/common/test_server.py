"""What a client sees of errors, malformed bytes and drains, over a real server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from neo_common import metrics
from neo_common.errors import ErrorDetails, Reason, ServiceError
from neo_common.grpc.server import ServiceServer
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import inference_pb2_grpc as pb_grpc
from protos.neo.v1 import types_pb2

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"]
SECRET = "the prompt"


class Servicer(pb_grpc.InferenceServiceServicer):
    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        if request.text == "bug":
            raise RuntimeError(SECRET)
        if request.text == "full":
            raise ServiceError(Reason.QUEUE_FULL, "full", field="text", retry_after=1.5)
        return pb.TokenizeResponse(token_ids=[1])

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        yield pb.GenerateStreamResponse(request_id="first")
        if request.text == "fail":
            raise ServiceError(Reason.HOST_TIER_LOST, "lost")
        await self.release.wait()
        yield pb.GenerateStreamResponse(request_id="last")


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[ServiceServer, Servicer, grpc.aio.Channel]]:
    server, servicer = ServiceServer("127.0.0.1:0", [SERVICE]), Servicer()
    pb_grpc.add_InferenceServiceServicer_to_server(servicer, server.grpc)
    address = await server.start()
    await server.set_serving(True)
    async with grpc.aio.insecure_channel(address) as channel:
        yield server, servicer, channel
    await server.grpc.stop(0)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """How a unary call, or the rest of a stream, fails."""

    async def exhaust() -> None:
        if hasattr(call, "__await__"):
            await call
        else:
            while await call.read() is not grpc.aio.EOF:
                pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await exhaust()
    return caught.value


async def test_service_errors_carry_reason_field_and_delay() -> None:
    async with serving() as (_, _, channel):
        stub = pb_grpc.InferenceServiceStub(channel)
        error = await failure(stub.Tokenize(pb.TokenizeRequest(text="full")))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    details = ErrorDetails(error)
    assert (details.reason, details.fields, details.retry_after) == ("QUEUE_FULL", ["text"], 1.5)


async def test_bugs_are_opaque_to_clients(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (_, _, channel):
        stub = pb_grpc.InferenceServiceStub(channel)
        with caplog.at_level(logging.ERROR):
            error = await failure(stub.Tokenize(pb.TokenizeRequest(text="bug")))
        assert (await stub.Tokenize(pb.TokenizeRequest(text="x"))).token_ids == [1]
    assert error.code() == grpc.StatusCode.INTERNAL
    assert SECRET not in (error.details() or "")
    ticket = (error.details() or "").rsplit(" ", 1)[1]
    assert ticket in caplog.text


async def test_errors_in_mid_stream() -> None:
    async with serving() as (_, _, channel):
        stub = pb_grpc.InferenceServiceStub(channel)
        call = stub.GenerateStream(pb.GenerateRequest(text="fail"))
        assert (await call.read()).request_id == "first"
        error = await failure(call)
    assert ErrorDetails(error).reason == "HOST_TIER_LOST"


@pytest.mark.parametrize("data", [b"\x0a\xff\xff\xff", b"\x12\x02\xff\xfe"], ids=["cut", "utf8"])
async def test_malformed_requests_are_the_clients_fault(data: bytes) -> None:
    async with serving() as (_, _, channel):
        unary = channel.unary_unary(f"/{SERVICE.full_name}/Tokenize")
        stream = channel.unary_stream(f"/{SERVICE.full_name}/GenerateStream")
        for call in (unary(data), stream(data)):
            assert (await failure(call)).code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_text_that_is_not_utf8_is_named() -> None:
    async with serving() as (_, _, channel):
        good = pb.GenerateRequest(text="hi", sampling=types_pb2.SamplingParams(stop=["ok", "ab"]))
        data = good.SerializeToString().replace(b"ab", b"\xff\xfe")
        error = await failure(channel.unary_stream(f"/{SERVICE.full_name}/GenerateStream")(data))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert ErrorDetails(error).fields == ["sampling.stop"]
    assert error.details() == "sampling.stop is not valid UTF-8"


async def test_drain_finishes_live_calls_and_refuses_new_ones() -> None:
    async with serving() as (server, servicer, channel):
        stub = pb_grpc.InferenceServiceStub(channel)
        call = stub.GenerateStream(pb.GenerateRequest(text="x"))
        await call.read()
        draining = asyncio.create_task(server.drain(10.0))
        await asyncio.wait({draining}, timeout=0.1)
        assert not draining.done()
        error = await failure(stub.Tokenize(pb.TokenizeRequest(text="x")))
        assert ErrorDetails(error).reason == "DRAINING"
        health = health_pb2_grpc.HealthStub(channel)
        status = (await health.Check(health_pb2.HealthCheckRequest())).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        servicer.release.set()
        assert (await call.read()).request_id == "last"
        assert await draining


async def test_the_grace_ends() -> None:
    async with serving() as (server, _, channel):
        call = pb_grpc.InferenceServiceStub(channel).GenerateStream(pb.GenerateRequest(text="x"))
        await call.read()
        assert not await server.drain(0.1)
        await failure(call)
        # The call is cut before its handler has ended.
        await asyncio.wait_for(server.guard.idle.wait(), 5)


async def test_cancelled_calls_leave_no_count() -> None:
    async with serving() as (server, _, channel):
        call = pb_grpc.InferenceServiceStub(channel).GenerateStream(pb.GenerateRequest(text="x"))
        await call.read()
        assert server.guard.live == 1
        call.cancel()
        await asyncio.wait_for(server.guard.idle.wait(), 5)


async def test_a_port_in_use_is_one_sentence() -> None:
    async with serving() as (server, _, _):
        with pytest.raises(ValueError, match="in use"):
            await ServiceServer(server.address, [SERVICE]).start()
        with pytest.raises(ValueError, match="HOST:PORT"):
            await ServiceServer("nonsense", [SERVICE]).start()
        with pytest.raises(ValueError, match="at most 65535, not 65537"):
            await ServiceServer("127.0.0.1:65537", [SERVICE]).start()


def test_a_metrics_port_that_cannot_be_is_one_sentence() -> None:
    with (
        pytest.raises(ValueError, match="metrics_port must be at most 65535, not 65536"),
        metrics.endpoint(CollectorRegistry(), 65536),
    ):
        pass


async def test_a_burst_of_calls_is_taken_whole() -> None:
    """gRPC's own bound would end some of them with CANCELLED from 1000 waiting ones on."""
    async with serving() as (_, _, channel):
        stub: Any = pb_grpc.InferenceServiceStub(channel)
        calls = [stub.Tokenize(pb.TokenizeRequest(text="a"), timeout=120) for _ in range(3500)]
        async with asyncio.timeout(120):
            answers = await asyncio.gather(*calls, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        assert not failures, failures[0]
