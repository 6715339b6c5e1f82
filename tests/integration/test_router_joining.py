"""A busy router joins a stream's messages: its client misses nothing of what comes with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from protos.neo.v1 import inference_pb2 as inference
from tests.support.fake_backend import FakeBackend, fake_backends
from tests.support.front import Front, front, rest


@asynccontextmanager
async def busy(backends: list[FakeBackend], hold_seconds: float) -> AsyncIterator[Front]:
    async with front(backends) as ready:
        ready.router.pace.stop()
        ready.router.pace.hold = hold_seconds
        yield ready


async def test_all_arrives_in_fewer_messages() -> None:
    async with fake_backends(1, tokens=50) as (a,), busy([a], 60.0) as ready:
        call = ready.inference.GenerateStream(
            inference.GenerateRequest(text="hi", request_id="r"), timeout=30
        )
        messages = await rest(call)
        texts = [delta.text for message in messages for delta in message.deltas]
        assert texts == [*(f"a{number} " for number in range(50)), ""]
        assert len(messages) == 2, "the first at once, all others when the answer had ended"
        assert messages[-1].request_id == "r"
        assert messages[-1].usage.completion_tokens == 50
        assert dict(await call.initial_metadata())["x-initial"] == "a"
        assert dict(await call.trailing_metadata())["x-trailing"] == "a"


async def test_what_came_before_a_failure_arrives() -> None:
    async with fake_backends(1, tokens=50, delay=0.01) as (a,), busy([a], 60.0) as ready:
        call = ready.inference.GenerateStream(inference.GenerateRequest(text="hi"), timeout=30)
        first = await call.read()
        await asyncio.sleep(0.2)
        await a.stop()
        second = await call.read()
        assert [delta.text for delta in first.deltas] == ["a0 "]
        assert [delta.text for delta in second.deltas][:3] == ["a1 ", "a2 ", "a3 "]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_leaves_ends_the_backends_call() -> None:
    async with fake_backends(1, tokens=100_000, delay=0.001) as (a,), busy([a], 0.05) as ready:
        call = ready.inference.GenerateStream(inference.GenerateRequest(text="hi"))
        await call.read()
        await call.read()
        assert a.live == 1
        call.cancel()
        reported = asyncio.Event()  # every 20 ms
        ready.router.registry.on_change(reported.set)
        async with asyncio.timeout(30):
            while a.live:
                reported.clear()
                await reported.wait()
