"""Both clients against a real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from neo_client import AsyncClient, Client, Sampling
from neo_client.errors import explain
from neo_common.errors import Reason, ServiceError
from tests.support.fake_backend import FakeBackend, fake_backends


@pytest.fixture
async def backend() -> AsyncIterator[FakeBackend]:
    async with fake_backends(1) as (only,):
        yield only


async def test_async_client(backend: FakeBackend) -> None:
    async with AsyncClient(backend.address) as client:
        assert (await client.generate("hi", request_id="r")).request_id == "r"
        stream = client.stream("hi", sampling=Sampling(max_tokens=3))
        messages = [message async for message in stream]
        assert messages[-1].usage.completion_tokens == 3
        assert (await client.models())[0].name == "a"
        assert (await client.model()).name == "a"
        ids = await client.tokenize("AB")
        assert ids == [65, 66]
        assert await client.detokenize(ids) == "AB"
        with pytest.raises(grpc.RpcError, match="no such request"):
            await client.abort("nobody")


async def test_closing_an_async_stream_cancels(backend: FakeBackend) -> None:
    backend.hold = asyncio.Event()
    async with AsyncClient(backend.address) as client:
        async with contextlib.aclosing(client.stream("hi")) as messages:
            await anext(messages)
        async with asyncio.timeout(5):
            await backend.cancelled.wait()


async def test_sync_client(backend: FakeBackend) -> None:
    def use() -> None:
        with Client(backend.address) as client:
            assert client.generate([1, 2], request_id="r").request_id == "r"
            with client.stream("hi") as messages:
                assert "".join(d.text for m in messages for d in m.deltas) == "a0 a1 a2 "
            assert client.models()[0].name == "a"
            assert client.model("a").name == "a"
            assert client.detokenize(client.tokenize("AB")) == "AB"
            with pytest.raises(grpc.RpcError):
                client.abort("nobody")

    await asyncio.to_thread(use)
    assert [list(r.token_ids.ids) for r in backend.requests] == [[1, 2], []]


async def test_leaving_a_sync_stream_cancels(backend: FakeBackend) -> None:
    backend.hold = asyncio.Event()

    def use() -> None:
        with Client(backend.address) as client, client.stream("hi") as messages:
            next(messages)

    await asyncio.to_thread(use)
    async with asyncio.timeout(5):
        await backend.cancelled.wait()


async def test_deadline(backend: FakeBackend) -> None:
    backend.hold = asyncio.Event()
    async with AsyncClient(backend.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in client.stream("hi", deadline_seconds=0.2):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_unavailable_is_retried_by_policy(backend: FakeBackend) -> None:
    """Three attempts on Generate, one on Abort."""
    backend.fail_with = ServiceError(Reason.DRAINING, "shutting down")
    async with AsyncClient(backend.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.generate("hi")
        assert len(backend.requests) == 3
        assert explain(caught.value) == "shutting down [UNAVAILABLE, DRAINING]"


async def test_errors_are_explained(backend: FakeBackend) -> None:
    backend.fail_with = ServiceError(Reason.QUEUE_FULL, "the queue is full", retry_after=1.5)
    async with AsyncClient(backend.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.generate("hi")
    text = "the queue is full [RESOURCE_EXHAUSTED, QUEUE_FULL]; try again in 1.5 s"
    assert explain(caught.value) == text
    await backend.stop()
    async with AsyncClient(backend.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.models()
    assert explain(caught.value).startswith("the server cannot be reached")
