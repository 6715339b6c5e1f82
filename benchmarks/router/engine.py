"""A gpu_service without an engine: `python -m benchmarks.router.engine --listen HOST:PORT`.

Streams get a token each step, all at once, as from an engine that decodes a batch. With `--merge`
tokens that a slow reader did not take yet leave together, as from the real front end; without, each
has a message of its own. A request's `max_tokens` says how many it gets.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import uvloop

from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import engine_pb2_grpc
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

SERVICE = inference.DESCRIPTOR.services_by_name["InferenceService"]
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Speed:
    first_ms: float
    """Until a request's first token."""
    step_ms: float
    """Between tokens; 0: as fast as they are taken."""
    merge: bool


class Engine(engine_pb2_grpc.EngineServiceServicer):
    """The handlers of one fake engine."""

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self._steps = 0
        self._step: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running = 0

    async def tick(self) -> None:
        """Steps, for ever."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + self._speed.step_ms / 1e3, loop.time())
            await asyncio.sleep(due - loop.time())
            self._steps += 1
            done, self._step = self._step, loop.create_future()
            done.set_result(None)

    async def generate_stream(self, request: inference.GenerateRequest, context: Any) -> None:
        """One message for each token, or for those that are due."""
        self._running += 1
        try:
            await asyncio.sleep(self._speed.first_ms / 1e3)
            tokens = request.sampling.max_tokens
            single = _tokens(request.request_id, 1)
            if self._speed.step_ms == 0:
                for _ in range(tokens):
                    await context.write(single)
            else:
                await self._paced(tokens, single, request.request_id, context)
            await context.write(_last(len(request.token_ids.ids), tokens))
        finally:
            self._running -= 1

    async def _paced(self, tokens: int, single: bytes, identity: str, context: Any) -> None:
        began, sent = self._steps, 0
        while sent < tokens:
            due = min(self._steps - began + 1, tokens)
            if sent == due:
                await asyncio.shield(self._step)
            elif self._speed.merge and due - sent > 1:
                await context.write(_tokens(identity, due - sent))
                sent = due
            else:
                await context.write(single)
                sent += 1

    async def generate(self, request: inference.GenerateRequest, context: Any) -> bytes:
        usage = types.Usage(prompt_tokens=len(request.token_ids.ids), completion_tokens=1)
        choice = inference.Choice(text=" a", token_ids=[1])
        answer = inference.GenerateResponse(choices=[choice], usage=usage)
        return answer.SerializeToString()

    async def get_model(self, request: inference.GetModelRequest, context: Any) -> bytes:
        return inference.GetModelResponse(model=inference.Model(name="fake")).SerializeToString()

    async def WatchLoad(
        self, request: engine.WatchLoadRequest, context: Any
    ) -> AsyncIterator[engine.WatchLoadResponse]:
        while True:
            gpu = engine.TierLoad(
                total_blocks=1 << 20,
                free_blocks=max(0, (1 << 20) - 8 * self._running),
                running_requests=self._running,
            )
            load = engine.LoadSnapshot(
                state=engine.ENGINE_STATE_SERVING, gpu=gpu, block_tokens=BLOCK_TOKENS
            )
            yield engine.WatchLoadResponse(load=load)
            await asyncio.sleep((request.interval_ms or 200) / 1e3)


def _tokens(identity: str, count: int) -> bytes:
    choice = inference.Choice(text=" the" * count, token_ids=[279] * count)
    message = inference.GenerateStreamResponse(request_id=identity, deltas=[choice])
    return message.SerializeToString()


def _last(prompt: int, tokens: int) -> bytes:
    usage = types.Usage(prompt_tokens=prompt, completion_tokens=tokens)
    choice = inference.Choice(finish_reason=types.FINISH_REASON_LENGTH)
    return inference.GenerateStreamResponse(deltas=[choice], usage=usage).SerializeToString()


def handler(serving: Engine) -> grpc.GenericRpcHandler[Any, Any]:
    """Messages leave as bytes: making each token's anew would only slow the load down."""

    def unary(call: Callable[..., Any], message: type[Any]) -> Any:
        return grpc.unary_unary_rpc_method_handler(call, request_deserializer=message.FromString)

    methods = {
        "Generate": unary(serving.generate, inference.GenerateRequest),
        "GetModel": unary(serving.get_model, inference.GetModelRequest),
        "GenerateStream": grpc.unary_stream_rpc_method_handler(
            serving.generate_stream, request_deserializer=inference.GenerateRequest.FromString
        ),
    }
    return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)


async def serve(listen: str, speed: Speed) -> None:
    serving = Engine(speed)
    options = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", 20_000),
        ("grpc.server.max_pending_requests", 100_000),
        ("grpc.server.max_pending_requests_hard_limit", 100_000),
    ]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((handler(serving),))
    engine_pb2_grpc.add_EngineServiceServicer_to_server(serving, server)
    server.add_insecure_port(listen)
    await server.start()
    ticking = asyncio.create_task(serving.tick()) if speed.step_ms else None
    await server.wait_for_termination()
    del ticking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--first-ms", type=float, default=0.0)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--merge", action="store_true")
    args = parser.parse_args()
    uvloop.run(serve(args.listen, Speed(args.first_ms, args.step_ms, args.merge)))


if __name__ == "__main__":
    main()
