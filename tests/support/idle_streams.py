"""Clients of their own process that open streams and then wait: `python -m
tests.support.idle_streams ADDRESS CONNECTIONS STREAMS`, so many on each connection.

Says "open" once each has had a message, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio

from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc

OPENING = 32


async def hold(address: str, connections: int, streams: int) -> None:
    request = inference.GenerateRequest(text="hi")
    request.sampling.max_tokens = 1000
    room = asyncio.Semaphore(OPENING)
    calls: list[Any] = []

    async def opened(stub: Any) -> None:
        async with room:
            call = stub.GenerateStream(request)
            calls.append(call)
            await call.read()

    async with AsyncExitStack() as stack:
        stubs: list[Any] = []
        for _ in range(connections):
            channel = grpc.aio.insecure_channel(
                address, options=(("grpc.use_local_subchannel_pool", 1),)
            )
            await stack.enter_async_context(channel)
            stubs.append(inference_pb2_grpc.InferenceServiceStub(channel))
        await asyncio.gather(*(opened(stub) for stub in stubs for _ in range(streams)))
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(hold(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
