"""What a request may ask of the scheduler, and what it is told when there is no room, through
router and gpu_service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest

from neo_common.errors import ErrorDetails
from protos.neo.v1 import engine_pb2, engine_pb2_grpc, inference_pb2_grpc, types_pb2
from protos.neo.v1 import inference_pb2 as inference
from tests.support.load import assert_idle_and_whole
from tests.support.stack import Stack, running_stack, stack_model

GPU_BLOCKS = 64
LONG = 900
"""Tokens of a request that is still running when the next ones have come."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One request at a time, two that may wait, and a GPU tier smaller than the host tier."""
    model = stack_model(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("stack")
    settings = {"max_running_requests": 1, "max_waiting_requests": 2, "gpu_kv_blocks": GPU_BLOCKS}
    with running_stack(folder, model, **settings) as running:
        yield running


@asynccontextmanager
async def client(stack: Stack) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
    async with grpc.aio.insecure_channel(stack.router.address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def request(tokens: int, **scheduling: object) -> inference.GenerateRequest:
    return inference.GenerateRequest(
        token_ids=types_pb2.TokenIds(ids=range(3, 20)),
        sampling=types_pb2.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
        scheduling=types_pb2.SchedulingParams(**scheduling),  # type: ignore[arg-type]
        token_ids_only=True,
    )


async def queued(stack: Stack, count: int) -> None:
    """Until so many requests wait."""
    async with grpc.aio.insecure_channel(stack.gpu.address) as channel:
        engine = engine_pb2_grpc.EngineServiceStub(channel)
        request = engine_pb2.WatchLoadRequest(interval_ms=10)
        async for message in engine.WatchLoad(request, timeout=20):
            if message.load.waiting_requests == count:
                return


async def started(stub: inference_pb2_grpc.InferenceServiceStub, tokens: int) -> grpc.aio.Call:
    """A stream that has its first token."""
    call = stub.GenerateStream(request(tokens), timeout=60)
    async for message in call:
        if message.deltas:
            break
    return call


async def test_a_full_queue_says_when_to_come_back(stack: Stack) -> None:
    async with client(stack) as stub:
        running = await started(stub, LONG)
        calls = (stub.Generate(request(4), timeout=60) for _ in range(2))
        waiting = [asyncio.ensure_future(call) for call in calls]
        await queued(stack, 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request(4), timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ErrorDetails(caught.value).reason == "QUEUE_FULL"
        assert 0 < (ErrorDetails(caught.value).retry_after or 0) <= 60
        running.cancel()
        # The others come to their turn all the same.
        for answer in await asyncio.gather(*waiting):
            assert answer.usage.completion_tokens == 4
    await assert_idle_and_whole(stack.gpu.address)


async def test_what_never_fits_is_refused_at_once(stack: Stack) -> None:
    """More than the one tier it may use holds, though not more than the other one."""
    gpu_only = request(16 * GPU_BLOCKS, placement=types_pb2.PLACEMENT_GPU_ONLY)
    async with client(stack) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(gpu_only, timeout=60)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ErrorDetails(caught.value).reason == "NEVER_FITS"
        assert ErrorDetails(caught.value).fields == ["sampling.max_tokens"]
        preferring = request(16 * GPU_BLOCKS, placement=types_pb2.PLACEMENT_CPU_PREFERRED)
        call = stub.GenerateStream(preferring, timeout=60)
        async for message in call:
            if message.deltas:
                break
        call.cancel()
    await assert_idle_and_whole(stack.gpu.address)


async def test_a_higher_priority_overtakes_the_queue(stack: Stack) -> None:
    async with client(stack) as stub:
        running = await started(stub, LONG)
        order: list[str] = []

        async def follow(name: str, priority: int) -> None:
            answer = await stub.Generate(request(2, priority=priority), timeout=60)
            order.append(name)
            assert answer.usage.completion_tokens == 2

        low = asyncio.ensure_future(follow("low", 0))
        await queued(stack, 1)
        high = asyncio.ensure_future(follow("high", 5))
        await queued(stack, 2)
        running.cancel()
        await asyncio.gather(low, high)
        assert order == ["high", "low"]
    await assert_idle_and_whole(stack.gpu.address)


@pytest.mark.parametrize(
    ("scheduling", "on_host"),
    [
        ({"placement": types_pb2.PLACEMENT_GPU_ONLY}, False),
        ({"placement": types_pb2.PLACEMENT_CPU_PREFERRED}, True),
        ({"placement": types_pb2.PLACEMENT_CPU_PREFERRED, "tpot_ms": 60_000.0}, True),
        # Nobody computes a token in a microsecond: it may not go where that is known to be missed.
        ({"placement": types_pb2.PLACEMENT_CPU_PREFERRED, "tpot_ms": 0.001}, False),
    ],
    ids=["gpu-only", "cpu-preferred", "loose-tpot", "tight-tpot"],
)
async def test_placement_and_latency_targets_decide_the_tier(
    stack: Stack, scheduling: dict[str, object], on_host: bool
) -> None:
    async with client(stack) as stub:
        # A target is believed only where iterations with host rows have been measured.
        known = request(4, placement=types_pb2.PLACEMENT_CPU_PREFERRED)
        assert (await stub.Generate(known, timeout=60)).usage.host_tokens == 4
        usage = (await stub.Generate(request(6, **scheduling), timeout=60)).usage
        assert usage.host_tokens == (6 if on_host else 0)
        assert usage.host_tokens + usage.gpu_tokens == usage.completion_tokens == 6
    await assert_idle_and_whole(stack.gpu.address)
