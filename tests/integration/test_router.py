"""A real router between real clients and scripted backends."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from neo_common.errors import Reason, ServiceError
from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import router_pb2, router_pb2_grpc
from router.app import ROUTER_SERVICE, running
from router.config import RouterConfig
from router.views import BackendState
from tests.support.fake_backend import fake_backends
from tests.support.front import deltas_left, details, front

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_streams_pass_through_with_metadata_both_ways() -> None:
    async with fake_backends(1) as (backend,), front([backend]) as ready:
        call = ready.inference.GenerateStream(
            inference.GenerateRequest(text="hi"),
            metadata=(("x-tenant", "t1"), ("trace-bin", b"\x00\xff")),
            timeout=30,
        )
        messages = [message async for message in call]
        assert [m.deltas[0].text for m in messages[:-1]] == ["a0 ", "a1 ", "a2 "]
        assert messages[-1].usage.completion_tokens == 3
        assert dict(await call.initial_metadata())["x-initial"] == "a"
        assert dict(await call.trailing_metadata())["x-trailing"] == "a"
        assert backend.metadata[0]["x-tenant"] == "t1"
        assert backend.metadata[0]["trace-bin"] == b"\x00\xff"
        assert 20 < (backend.time_left[0] or 0) < 31, "gRPC rounds up"


async def test_fields_that_the_router_does_not_know_survive() -> None:
    """Bytes are relayed as they are: here a request with a field of a future version."""
    async with fake_backends(1) as (backend,), front([backend]) as ready:
        future = inference.GenerateRequest(text="hi").SerializeToString() + b"\xba\x3e\x03new"
        channel: Any = ready.channel
        await channel.unary_unary("/neo.v1.InferenceService/Generate")(future)
        assert backend.requests[0].SerializeToString() == future


async def test_every_unary_method() -> None:
    async with fake_backends(1) as (backend,), front([backend]) as ready:
        stub = ready.inference
        answer = await stub.Generate(inference.GenerateRequest(text="hi", request_id="r"))
        assert (answer.model, answer.request_id) == ("a", "r")
        assert (await stub.ListModels(inference.ListModelsRequest())).models[0].name == "a"
        assert (await stub.GetModel(inference.GetModelRequest())).model.name == "a"
        tokens = await stub.Tokenize(inference.TokenizeRequest(text="AB"))
        assert list(tokens.token_ids) == [65, 66]
        text = await stub.Detokenize(inference.DetokenizeRequest(token_ids=[65]))
        assert text.text == "A"


async def test_what_is_wrong_with_a_request_is_said_once() -> None:
    error = ServiceError(Reason.NEVER_FITS, "too long")
    async with fake_backends(2, fail_with=error) as backends, front(backends) as ready:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.text()
        assert details(caught).reason == "NEVER_FITS"
        assert sum(len(backend.requests) for backend in backends) == 1


async def test_full_queues_are_not_tried() -> None:
    """Another backend is asked for room only as long as it has said to have some."""
    error = ServiceError(Reason.QUEUE_FULL, "the queue is full")
    async with (
        fake_backends(2, fail_with=error, waiting=64) as backends,
        front(backends) as ready,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.text()
        assert details(caught).reason == "QUEUE_FULL"
        assert sum(len(backend.requests) for backend in backends) == 1


async def test_errors_pass_through_with_their_details() -> None:
    error = ServiceError(Reason.QUEUE_FULL, "the queue is full", retry_after=2.5)
    async with fake_backends(2, fail_with=error) as backends, front(backends) as ready:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.text()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "the queue is full"
        assert details(caught).reason == "QUEUE_FULL"
        assert details(caught).retry_after == 2.5
        assert dict(caught.value.trailing_metadata())["x-from"] in ("a", "b")
        assert [len(backend.requests) for backend in backends] == [1, 1], "both said to have room"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.inference.GetModel(inference.GetModelRequest(model="?"))
        assert details(caught).fields == ["model"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.inference.Generate(inference.GenerateRequest())
        assert details(caught).reason == "QUEUE_FULL"
        for call in (
            ready.inference.Tokenize(inference.TokenizeRequest()),
            ready.inference.Detokenize(inference.DetokenizeRequest(token_ids=[999])),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_unavailable_is_retried_elsewhere_before_the_first_message() -> None:
    draining = ServiceError(Reason.DRAINING, "shutting down")
    async with fake_backends(2) as (a, b), front([a, b]) as ready:
        a.fail_with = draining
        assert {await ready.text() for _ in range(6)} == {"b0 b1 b2 "}
        assert a.requests, "it was tried"
        b.fail_with = draining
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.text()
        assert details(caught).reason == "DRAINING", "the last backend's own words"


async def test_a_stream_that_breaks_after_a_message_is_not_retried() -> None:
    async with fake_backends(2) as (a, b), front([a, b]) as ready:
        a.hold = b.hold = asyncio.Event()
        call = ready.inference.GenerateStream(inference.GenerateRequest(text="hi"))
        first = await call.read()
        serving = a if first.deltas[0].text.startswith("a") else b
        other = b if serving is a else a
        await serving.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert serving.address not in (caught.value.details() or "")
        assert not other.requests
        other.hold.set()  # type: ignore[union-attr]
        assert await ready.text() == f"{other.name}0 {other.name}1 {other.name}2 "


async def test_a_lost_backend_is_left_out_and_comes_back() -> None:
    async with fake_backends(2) as (a, b), front([a, b]) as ready:
        address = a.address
        await a.stop()
        await ready.states(BackendState.DOWN, BackendState.UP)
        assert {await ready.text() for _ in range(4)} == {"b0 b1 b2 "}
        await a.start(address)
        await ready.states(BackendState.UP, BackendState.UP)
        assert {await ready.text() for _ in range(4)} == {"a0 a1 a2 ", "b0 b1 b2 "}


async def test_a_backend_that_falls_silent_is_left_out() -> None:
    """A half-open connection: everything looks connected, nothing comes."""
    async with fake_backends(2) as (a, b), front([a, b]) as ready:
        a.report_load = False
        await ready.states(BackendState.SUSPECT, BackendState.UP)
        assert {await ready.text() for _ in range(4)} == {"b0 b1 b2 "}
        await ready.states(BackendState.DOWN, BackendState.UP)
        a.report_load = True
        await ready.states(BackendState.UP, BackendState.UP)


async def test_without_a_backend_clients_are_told_to_come_back() -> None:
    async with fake_backends(1) as (a,), front([a], retry_after_seconds=3.0) as ready:
        await ready.until_health(SERVING)
        await a.stop()
        await ready.states(BackendState.DOWN)
        await ready.until_health(NOT_SERVING)
        for call in (
            ready.inference.ListModels(inference.ListModelsRequest()),
            ready.inference.Abort(inference.AbortRequest(request_id="x")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert details(caught).reason == "NO_BACKEND"
            assert details(caught).retry_after == 3.0
        await a.start(a.address)
        await ready.until_health(SERVING)


async def test_a_burst_spreads() -> None:
    async with fake_backends(3) as backends, front(backends, load_interval_ms=400) as ready:
        hold = asyncio.Event()
        for backend in backends:
            backend.hold = hold
        calls = [
            ready.inference.GenerateStream(inference.GenerateRequest(text="hi")) for _ in range(30)
        ]
        await asyncio.gather(*(call.read() for call in calls))
        assert [backend.live for backend in backends] == [10, 10, 10]
        hold.set()
        for call in calls:
            call.cancel()


async def test_the_least_loaded_is_chosen() -> None:
    async with fake_backends(2) as (a, b), front([a, b]) as ready:
        a.free_blocks = 10
        async for message in ready.operator.WatchBackends(
            router_pb2.WatchBackendsRequest(interval_ms=10)
        ):
            if message.backends[0].load.gpu.free_blocks == 10:
                break
        assert {await ready.text() for _ in range(5)} == {"b0 b1 b2 "}


async def test_cancelling_reaches_the_backend() -> None:
    async with fake_backends(1) as (a,), front([a]) as ready:
        a.hold = asyncio.Event()
        call = ready.inference.GenerateStream(inference.GenerateRequest(text="hi"))
        await call.read()
        call.cancel()
        async with asyncio.timeout(5):
            await a.cancelled.wait()
        assert a.live == 0


async def test_deadlines_reach_the_backend() -> None:
    async with fake_backends(1) as (a,), front([a]) as ready:
        a.hold = asyncio.Event()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in ready.inference.GenerateStream(
                inference.GenerateRequest(text="hi"), timeout=0.3
            ):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(5):
            await a.cancelled.wait()


async def test_abort_finds_the_backend_that_has_the_request() -> None:
    async with fake_backends(3) as backends, front(backends) as ready:
        for backend in backends:
            backend.hold = asyncio.Event()
        call = ready.inference.GenerateStream(
            inference.GenerateRequest(text="hi", request_id="mine")
        )
        await call.read()
        await ready.inference.Abort(inference.AbortRequest(request_id="mine"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.inference.Abort(inference.AbortRequest(request_id="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert details(caught).reason == "REQUEST_NOT_FOUND"
        call.cancel()


async def test_too_many_calls_are_refused() -> None:
    async with fake_backends(1) as (a,), front([a], max_calls=2) as ready:
        a.hold = asyncio.Event()
        calls = [
            ready.inference.GenerateStream(inference.GenerateRequest(text="hi")) for _ in range(2)
        ]
        await asyncio.gather(*(call.read() for call in calls))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.text()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(caught).reason == "OVERLOADED"
        assert details(caught).retry_after is not None
        calls[0].cancel()
        async with asyncio.timeout(5):
            await a.cancelled.wait()
        a.hold.set()
        assert await ready.text() == "a0 a1 a2 "
        calls[1].cancel()


async def test_draining_a_backend_lets_its_streams_finish() -> None:
    async with fake_backends(2) as (a, b), front([a, b]) as ready:
        a.hold = b.hold = asyncio.Event()
        call = ready.inference.GenerateStream(inference.GenerateRequest(text="hi"))
        first = await call.read()
        name = first.deltas[0].text[0]
        serving, other = (a, b) if name == "a" else (b, a)
        answer = await ready.operator.DrainBackend(
            router_pb2.DrainBackendRequest(address=serving.address)
        )
        assert (answer.live_requests, serving.drained) == (1, 1)
        states = {serving.name: BackendState.DRAINING, other.name: BackendState.UP}
        await ready.states(states["a"], states["b"])
        serving.hold.set()  # type: ignore[union-attr]
        assert await deltas_left(call) == 3
        assert {(await ready.text())[0] for _ in range(4)} == {other.name}


async def test_prefix_caches_are_reset_one_by_one_or_all() -> None:
    async with fake_backends(2) as (a, b), front([a, b]) as ready:
        reset = ready.operator.ResetBackendPrefixCache
        asked = router_pb2.ResetBackendPrefixCacheRequest
        assert list((await reset(asked(address=a.address))).addresses) == [a.address]
        assert (a.resets, b.resets) == (1, 0)
        assert list((await reset(asked())).addresses) == [a.address, b.address]
        assert (a.resets, b.resets) == (2, 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reset(asked(address="nobody:1"))
        assert details(caught).reason == "UNKNOWN_BACKEND"
        await a.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reset(asked())
        assert details(caught).reason == "BACKEND_LOST"
        assert caught.value.details() == (
            f"1 of 2 prefix caches were not reset: {a.address} (UNAVAILABLE); reset: {b.address}"
        )
        assert b.resets == 2
        b.fail_with = ServiceError(Reason.ENGINE_LOST, "the engine core has ended")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reset(asked())
        assert (caught.value.code(), caught.value.details()) == (
            grpc.StatusCode.UNAVAILABLE,
            f"2 of 2 prefix caches were not reset: {a.address} (UNAVAILABLE), "
            f"{b.address} (ENGINE_LOST); reset: none",
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reset(asked(address=b.address))
        assert details(caught).reason == "ENGINE_LOST"
        assert caught.value.details() == "the engine core has ended"
        await a.start(a.address)
        await ready.states(BackendState.UP, BackendState.UP)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reset(asked())
        assert details(caught).reason == "ENGINE_LOST"
        assert str(caught.value.details()).endswith(f"reset: {a.address}")
        assert a.resets == 3


async def test_draining_what_is_not_there() -> None:
    async with fake_backends(1) as (a,), front([a]) as ready:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.operator.DrainBackend(router_pb2.DrainBackendRequest(address="nobody:1"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        await a.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.operator.DrainBackend(router_pb2.DrainBackendRequest(address=a.address))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(caught).reason == "BACKEND_LOST"


async def test_list_and_watch_backends() -> None:
    async with fake_backends(2) as (a, b), front([a, b]) as ready:
        await ready.text()
        listed = await ready.operator.ListBackends(router_pb2.ListBackendsRequest())
        assert [backend.address for backend in listed.backends] == [a.address, b.address]
        assert sum(backend.calls_total for backend in listed.backends) == 1
        assert listed.backends[0].load.instance_id == "a"
        assert 0 <= listed.backends[0].load_age_seconds < 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.operator.WatchBackends(
                router_pb2.WatchBackendsRequest(interval_ms=5)
            ).read()
        assert details(caught).fields == ["interval_ms"]


async def test_the_router_drains() -> None:
    """NOT_SERVING, no new call, the live stream to its end."""
    async with AsyncExitStack() as stack:
        (a,) = await stack.enter_async_context(fake_backends(1))
        a.hold = asyncio.Event()
        ready = await stack.enter_async_context(front([a], drain_grace_seconds=5.0))
        call = ready.inference.GenerateStream(inference.GenerateRequest(text="hi"))
        await call.read()
        stopping = asyncio.create_task(ready.router.server.drain(5.0))
        await ready.until_health(NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.text()
        assert details(caught).reason == "DRAINING"
        a.hold.set()
        assert await deltas_left(call) == 3
        assert await stopping


async def test_a_backend_that_is_not_a_gpu_service_is_down() -> None:
    """Another server's port: the watch fails with UNIMPLEMENTED, and the reason can be read."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        config = RouterConfig(
            listen="127.0.0.1:0", backends=(f"127.0.0.1:{port}",), reconnect_seconds=0.02
        )
        async with (
            running(config) as router,
            grpc.aio.insecure_channel(router.server.address) as channel,
        ):
            stub: Any = router_pb2_grpc.RouterServiceStub(channel)
            async with asyncio.timeout(5):
                async for message in stub.WatchBackends(
                    router_pb2.WatchBackendsRequest(interval_ms=10)
                ):
                    if "UNIMPLEMENTED" in message.backends[0].problem:
                        break
            assert message.backends[0].state == router_pb2.BACKEND_STATE_DOWN
            assert not message.backends[0].HasField("load")
    finally:
        await server.stop(None)


def test_states_of_engines_are_all_handled() -> None:
    """A new EngineState must be thought about in Backend.assess."""
    assert set(engine.EngineState.keys()) == {
        f"ENGINE_STATE_{name}" for name in ("UNSPECIFIED", "STARTING", "SERVING", "DRAINING")
    }


@pytest.mark.parametrize("method", [m.name for m in ROUTER_SERVICE.methods])
async def test_malformed_requests(method: str) -> None:
    """The router's own methods; those that it relays are the backends' to judge."""
    async with fake_backends(1) as (a,), front([a]) as ready:
        channel: Any = ready.channel
        call = channel.unary_stream(f"/{ROUTER_SERVICE.full_name}/{method}")(b"\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(caught).reason == "INVALID_ARGUMENT"
