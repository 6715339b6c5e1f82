"""A gpu_service without an engine, for tests of what stands in front of one: a real grpc.aio server
whose answers, load and misbehaviour the test decides."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from neo_common.errors import Reason, ServiceError
from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import engine_pb2_grpc, inference_pb2_grpc, types_pb2
from protos.neo.v1 import inference_pb2 as inference

BLOCK_TOKENS = 16


@dataclass
class FakeBackend(
    inference_pb2_grpc.InferenceServiceServicer, engine_pb2_grpc.EngineServiceServicer
):
    """Streams `tokens` messages per request, `delay` seconds apart; `fail_with` refuses every
    request instead."""

    name: str
    tokens: int = 3
    delay: float = 0.0
    fail_with: ServiceError | None = None
    free_blocks: int = 1000
    total_blocks: int = 1000
    waiting: int = 0
    state: engine.EngineState = engine.ENGINE_STATE_SERVING
    address: str = ""
    requests: list[inference.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    time_left: list[float | None] = field(default_factory=list)
    live: int = 0
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    hold: asyncio.Event | None = None
    """When set, streams wait for it after their first message."""
    begin: asyncio.Event | None = None
    """When set, answers wait for it before their first message."""
    break_calls: bool = False
    """Every request ends as if the connection had broken; load is reported as before."""
    report_load: bool = True
    live_ids: set[str] = field(default_factory=set)
    drained: int = 0
    resets: int = 0
    models: tuple[str, ...] = ()
    """That it reports to serve."""
    _server: Any = None
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, address: str = "127.0.0.1:0") -> str:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(address)
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        return self.address

    async def restart_begins(self, grace: float = 30.0) -> None:
        """As a gpu_service that gets SIGTERM: it refuses new calls, ends when the live ones have
        ended, and is another process when it starts again."""
        self.fail_with = ServiceError(Reason.DRAINING, "draining", retry_after=1.0)
        self.state = engine.ENGINE_STATE_DRAINING
        self._idle = asyncio.Event()
        if self.live:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        await self.stop()
        self.fail_with, self.state = None, engine.ENGINE_STATE_SERVING

    async def stop(self) -> None:
        """At once, as if killed: streams break."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def _left(self) -> None:
        self.live -= 1
        if self.live == 0:
            self._idle.set()

    # InferenceService ---------------------------------------------------------------------------

    async def _begin(self, request: inference.GenerateRequest, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_left.append(context.time_remaining())
        if self.break_calls:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{self.address}: connection reset")
        if self.begin is not None:
            await self.begin.wait()
        if self.fail_with is not None:
            status: Any = self.fail_with.to_status()
            trailing = (*status.trailing_metadata, ("x-from", self.name))
            await context.abort(status.code, status.details, trailing)

    async def Generate(self, request: inference.GenerateRequest, context: Any) -> Any:
        self.live += 1
        try:
            await self._begin(request, context)
        finally:
            self._left()
        await context.send_initial_metadata((("x-initial", self.name),))
        context.set_trailing_metadata((("x-trailing", self.name),))
        return inference.GenerateResponse(request_id=request.request_id, model=self.name)

    async def GenerateStream(
        self, request: inference.GenerateRequest, context: Any
    ) -> AsyncIterator[inference.GenerateStreamResponse]:
        self.live += 1
        self.live_ids.add(request.request_id)
        try:
            await self._begin(request, context)
            await context.send_initial_metadata((("x-initial", self.name),))
            context.set_trailing_metadata((("x-trailing", self.name),))
            for number in range(self.tokens):
                delta = inference.Choice(text=f"{self.name}{number} ", token_ids=[number])
                yield inference.GenerateStreamResponse(
                    request_id=request.request_id, deltas=[delta]
                )
                if self.hold is not None:
                    await self.hold.wait()
                await asyncio.sleep(self.delay)
            usage = types_pb2.Usage(
                prompt_tokens=5, completion_tokens=self.tokens, gpu_tokens=1,
                host_tokens=self.tokens - 1, ttft_seconds=0.01,
            )  # fmt: skip
            yield inference.GenerateStreamResponse(
                usage=usage, deltas=[inference.Choice(finish_reason=types_pb2.FINISH_REASON_LENGTH)]
            )
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self._left()
            self.live_ids.discard(request.request_id)

    async def Abort(self, request: inference.AbortRequest, context: Any) -> Any:
        if request.request_id not in self.live_ids:
            error = ServiceError(Reason.REQUEST_NOT_FOUND, "no such request is live here")
            await context.abort_with_status(error.to_status())
        return inference.AbortResponse()

    async def ListModels(self, request: Any, context: Any) -> Any:
        return inference.ListModelsResponse(
            models=[inference.Model(name=name) for name in self.models or (self.name,)]
        )

    async def GetModel(self, request: inference.GetModelRequest, context: Any) -> Any:
        if request.model not in ("", self.name):
            error = ServiceError(Reason.UNKNOWN_MODEL, "no such model", field="model")
            await context.abort_with_status(error.to_status())
        return inference.GetModelResponse(model=inference.Model(name=self.name))

    async def Tokenize(self, request: inference.TokenizeRequest, context: Any) -> Any:
        if request.WhichOneof("input") is None:
            error = ServiceError(Reason.INVALID_ARGUMENT, "input is missing", field="input")
            await context.abort_with_status(error.to_status())
        return inference.TokenizeResponse(token_ids=list(request.text.encode()))

    async def Detokenize(self, request: inference.DetokenizeRequest, context: Any) -> Any:
        if any(token > 255 for token in request.token_ids):
            error = ServiceError(Reason.INVALID_ARGUMENT, "out of range", field="token_ids")
            await context.abort_with_status(error.to_status())
        return inference.DetokenizeResponse(text=bytes(request.token_ids).decode())

    # EngineService ------------------------------------------------------------------------------

    def snapshot(self) -> engine.LoadSnapshot:
        return engine.LoadSnapshot(
            state=self.state,
            gpu=engine.TierLoad(total_blocks=self.total_blocks, free_blocks=self.free_blocks),
            waiting_requests=self.waiting,
            max_waiting_requests=64,
            block_tokens=BLOCK_TOKENS,
            instance_id=self.name,
            models=self.models,
        )

    async def GetLoad(self, request: Any, context: Any) -> Any:
        return engine.GetLoadResponse(load=self.snapshot())

    async def WatchLoad(
        self, request: engine.WatchLoadRequest, context: Any
    ) -> AsyncIterator[engine.WatchLoadResponse]:
        while True:
            if self.report_load:
                yield engine.WatchLoadResponse(load=self.snapshot())
            await asyncio.sleep((request.interval_ms or 200) / 1000)

    async def Drain(self, request: Any, context: Any) -> Any:
        self.drained += 1
        self.state = engine.ENGINE_STATE_DRAINING
        return engine.DrainResponse(live_requests=self.live)

    async def ResetPrefixCache(self, request: Any, context: Any) -> Any:
        if self.fail_with is not None:
            status: Any = self.fail_with.to_status()
            await context.abort_with_status(status)
        self.resets += 1
        return engine.ResetPrefixCacheResponse()


@contextlib.asynccontextmanager
async def fake_backends(count: int, **settings: Any) -> AsyncIterator[list[FakeBackend]]:
    """`count` of them, named `a`, `b`, ...; all are stopped at the end."""
    backends = [FakeBackend(name=chr(ord("a") + i), **settings) for i in range(count)]
    try:
        for backend in backends:
            await backend.start()
        yield backends
    finally:
        for backend in backends:
            await backend.stop()
