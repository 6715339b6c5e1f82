"""Our own client: messages stay bytes, so that it takes little of the machine.

`python -m benchmarks.router.load --address HOST:PORT --streams N --tokens N` reads streams.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

UNARY = "/neo.v1.InferenceService/Generate"
STREAM = "/neo.v1.InferenceService/GenerateStream"
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the published stubs lack it
PROMPT_TOKENS = 128


def request(tokens: int, identity: str = "") -> bytes:
    message = inference.GenerateRequest(
        request_id=identity,
        token_ids=types.TokenIds(ids=range(1000, 1000 + PROMPT_TOKENS)),
        sampling=types.SamplingParams(max_tokens=tokens),
    )
    return message.SerializeToString()


@asynccontextmanager
async def channels(address: str, count: int = 1) -> AsyncIterator[list[Any]]:
    """Connections of their own."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    opened = [grpc.aio.insecure_channel(address, options=options) for _ in range(count)]
    try:
        for channel in opened:
            await channel.channel_ready()
        yield opened
    finally:
        for channel in opened:
            await channel.close()


@dataclass(frozen=True)
class Streamed:
    """How one stream went."""

    messages: int
    tokens: int
    """By the usage in its last message; 0 if that did not come."""
    first_at: float | None
    """perf_counter when its first message came."""
    ended_at: float
    code: grpc.StatusCode


async def stream(
    channel: Any, tokens: int, identity: str = "", begun: Callable[[], None] = lambda: None
) -> Streamed:
    """One stream, read to its end. begun: called when its first message comes."""
    call = channel.unary_stream(STREAM)(request(tokens, identity))
    messages, last, first_at = 0, b"", None
    code = grpc.StatusCode.OK
    try:
        while (message := await call.read()) is not EOF:
            if first_at is None:
                first_at = time.perf_counter()
                begun()
            messages += 1
            last = message
    except grpc.aio.AioRpcError as error:
        code = error.code()
    if first_at is None:
        begun()  # nothing will
    usage = inference.GenerateStreamResponse.FromString(last).usage
    return Streamed(messages, usage.completion_tokens, first_at, time.perf_counter(), code)


async def streams(opened: Sequence[Any], count: int, tokens: int) -> list[Streamed]:
    """`count` of them at once, spread over the channels."""
    calls = (
        stream(opened[number % len(opened)], tokens, f"stream-{number:032d}")
        for number in range(count)
    )
    return await asyncio.gather(*calls)


async def unary_seconds(channel: Any, message: bytes) -> float:
    """Of one call that must end well."""
    began = time.perf_counter()
    await channel.unary_unary(UNARY)(message)
    return time.perf_counter() - began


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]


async def run(address: str, count: int, tokens: int) -> None:
    async with channels(address) as opened:
        await streams(opened, count, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", help="not used; all processes of a benchmark get one")
    parser.add_argument("--address", required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    args = parser.parse_args()
    asyncio.run(run(args.address, args.streams, args.tokens))


if __name__ == "__main__":
    main()
