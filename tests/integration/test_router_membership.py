"""Backends that come, go and serve different models, while a router runs."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from protos.compat import kserve_pb2 as kserve
from protos.compat import kserve_pb2_grpc, vllm_engine_pb2_grpc
from protos.compat import vllm_engine_pb2 as vllm
from protos.neo.v1 import inference_pb2 as inference
from router.keys import MODEL_HEADER
from router.views import BackendState
from tests.support.fake_backend import fake_backends
from tests.support.front import deltas_left, details, front

UP, DRAINING = BackendState.UP, BackendState.DRAINING


async def test_a_backend_that_is_added_gets_calls() -> None:
    async with fake_backends(2) as (a, b), front([a]) as ready:
        assert await ready.text() == "a0 a1 a2 "
        ready.router.registry.apply([a.address, b.address])
        await ready.states(UP, UP)
        assert {(await ready.text())[0] for _ in range(4)} == {"a", "b"}


async def test_a_backend_that_is_removed_finishes_what_it_has() -> None:
    async with fake_backends(2) as (a, b), front([a]) as ready:
        a.hold = asyncio.Event()
        call = ready.inference.GenerateStream(
            inference.GenerateRequest(text="hi", request_id="mine")
        )
        await call.read()
        ready.router.registry.apply([b.address])
        await ready.states(DRAINING, UP)
        assert await ready.text() == "b0 b1 b2 "
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.inference.Abort(inference.AbortRequest(request_id="other"))
        assert details(caught).reason == "REQUEST_NOT_FOUND", "it is still asked"
        a.hold.set()
        assert await deltas_left(call) == 3
        await ready.states(UP)
        assert [backend.address for backend in ready.router.registry.backends] == [b.address]


async def test_a_backend_that_comes_back_while_it_drains_stays() -> None:
    async with fake_backends(2) as (a, b), front([a, b]) as ready:
        a.hold = b.hold = asyncio.Event()
        calls = [
            ready.inference.GenerateStream(inference.GenerateRequest(text="hi")) for _ in range(2)
        ]
        await asyncio.gather(*(call.read() for call in calls))
        for addresses, states in (
            ([b.address], (DRAINING, UP)),
            ([a.address, b.address], (UP, UP)),
        ):
            ready.router.registry.apply(addresses)
            await ready.states(*states)
        a.hold.set()
        assert [await deltas_left(call) for call in calls] == [3, 3]
        assert len(ready.router.registry.backends) == 2


async def test_models_are_found_where_they_are() -> None:
    async with fake_backends(2) as (a, b):
        a.models, b.models = ("small",), ("large",)
        async with front([a, b]) as ready:
            for _ in range(3):
                assert await ready.text(model="small") == "a0 a1 a2 "
                assert await ready.text(model="large") == "b0 b1 b2 "
            listed = await ready.inference.ListModels(inference.ListModelsRequest())
            assert [model.name for model in listed.models] == ["small", "large"]
            for model in ("huge", ""):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ready.text(model=model)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert details(caught).reason == "UNKNOWN_MODEL"
                assert details(caught).fields == ["model"]
                assert "large, small" in str(caught.value.details())
            await a.stop()
            await ready.states(BackendState.DOWN, UP)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ready.text(model="small")
            assert details(caught).reason == "NO_BACKEND", "it is known, and away"
            listed = await ready.inference.ListModels(inference.ListModelsRequest())
            assert [model.name for model in listed.models] == ["large"]


async def test_a_default_model() -> None:
    async with fake_backends(2) as (a, b):
        a.models, b.models = ("small",), ("large",)
        async with front([a, b], default_model="large") as ready:
            assert {await ready.text() for _ in range(3)} == {"b0 b1 b2 "}


async def test_models_of_the_other_protocols() -> None:
    """They are not served by these backends: what matters is which one was asked."""
    async with fake_backends(2) as (a, b):
        a.models, b.models = ("small",), ("large",)
        async with front([a, b]) as ready:
            infer: Any = kserve_pb2_grpc.GRPCInferenceServiceStub(ready.channel)
            engine: Any = vllm_engine_pb2_grpc.VllmEngineStub(ready.channel)
            await unimplemented(infer.ModelInfer(kserve.ModelInferRequest(model_name="small")))
            await unimplemented(infer.ModelReady(kserve.ModelReadyRequest(name="large")))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await infer.ModelInfer(kserve.ModelInferRequest(model_name="huge"))
            assert details(caught).reason == "UNKNOWN_MODEL"
            request = vllm.GenerateRequest(text="hi")
            named = engine.Generate(request, metadata=((MODEL_HEADER, "large"),))
            await unimplemented(named.read())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await engine.Generate(request).read()
            assert details(caught).reason == "UNKNOWN_MODEL"
            totals = [backend.calls_total for backend in ready.router.registry.backends]
            assert totals == [1, 2]


async def unimplemented(call: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
