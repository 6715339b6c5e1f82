"""The baseline: a proxy as one writes it with grpc.aio and generated stubs, which parses and builds
each message again. `python -m benchmarks.router.proxy --listen HOST:PORT --backend HOST:PORT`"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import uvloop

from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc


class Proxy(inference_pb2_grpc.InferenceServiceServicer):
    """Passes every call on to `stub`."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def GetModel(self, request: inference.GetModelRequest, context: Any) -> Any:
        return await self._stub.GetModel(request)

    async def Generate(self, request: inference.GenerateRequest, context: Any) -> Any:
        return await self._stub.Generate(request)

    async def GenerateStream(
        self, request: inference.GenerateRequest, context: Any
    ) -> AsyncIterator[inference.GenerateStreamResponse]:
        async for message in self._stub.GenerateStream(request):
            yield message


async def serve(listen: str, backend: str) -> None:
    async with grpc.aio.insecure_channel(backend) as channel:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        proxy = Proxy(inference_pb2_grpc.InferenceServiceStub(channel))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(proxy, server)
        server.add_insecure_port(listen)
        await server.start()
        await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--backend", required=True)
    args = parser.parse_args()
    uvloop.run(serve(args.listen, args.backend))


if __name__ == "__main__":
    main()
