"""Messages that a busy router joins: bytes in a row must be what the messages mean one by one."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import types_pb2 as types
from router.joining import Joined, Pace
from tests.fuzz.front import wait
from tests.fuzz.target import Finding, Target

_CUT = b"\xff\xfe|"


def _one(data: bytes) -> None:
    parts = data.split(_CUT)
    written: list[bytes] = []

    async def write(message: bytes) -> None:
        written.append(message)

    async def join() -> None:
        pace = Pace(0.0)
        pace.hold = 10.0
        async with Joined(write, pace) as joined:
            for part in parts:
                await joined.put(part)

    wait(join())
    if b"".join(written) != b"".join(parts):
        raise Finding("bytes were lost, or came in another order")
    try:
        apart = [choice for part in parts for choice in _choices(part)]
    except DecodeError:
        return
    if [choice for message in written for choice in _choices(message)] != apart:
        raise Finding("joined messages hold other choices")


def _choices(message: bytes) -> list[bytes]:
    deltas = pb.GenerateStreamResponse.FromString(message).deltas
    return [delta.SerializeToString(deterministic=True) for delta in deltas]


def seeds() -> list[bytes]:
    entry = types.TokenLogprobs(token_id=3, logprob=-1.5, rank=1)
    messages = [
        pb.GenerateStreamResponse(
            request_id="r", deltas=[pb.Choice(index=0, text="a", token_ids=[1], logprobs=[entry])]
        ),
        pb.GenerateStreamResponse(request_id="r", deltas=[pb.Choice(index=1, token_ids=[2, 3])]),
        pb.GenerateStreamResponse(
            request_id="r",
            deltas=[pb.Choice(text="b", finish_reason=types.FINISH_REASON_STOP, stop_string="x")],
            usage=types.Usage(prompt_tokens=3, completion_tokens=2),
        ),
    ]
    parts = [message.SerializeToString() for message in messages]
    return [_CUT.join(parts), _CUT.join(parts[:2]), parts[0], _CUT.join(parts * 3)]


TARGET = Target("router_joining", _one, seeds, "wire", (_CUT,))
