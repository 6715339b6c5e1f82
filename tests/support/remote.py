"""A client of its own process, for a namespace of its own: `python -m tests.support.remote ADDRESS
STREAMS` says "begun" when each stream has had a message, and in the end how each ended, as JSON:
its text, or [status, seconds since "begun"]."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import grpc.aio

from neo_client.connect import Connection
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc


async def run(address: str, streams: int) -> list[Any]:
    begun = 0.0

    async def rest(call: Any, text: str) -> Any:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                text += "".join(delta.text for delta in message.deltas)
        except grpc.aio.AioRpcError as error:
            return [error.code().name, time.monotonic() - begun]
        return text

    async with Connection(address).open_aio() as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference.GenerateRequest(text="hi")
        calls = [stub.GenerateStream(request) for _ in range(streams)]
        firsts = [(await call.read()).deltas[0].text for call in calls]
        begun = time.monotonic()
        print("begun", flush=True)
        return await asyncio.gather(*map(rest, calls, firsts))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], int(sys.argv[2])))))
