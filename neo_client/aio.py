"""The asyncio client."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from neo_client.client import QUESTION_SECONDS, tokenize_request
from neo_client.connect import Connection, Retries, Tls, Token
from neo_client.options import Prompt, Sampling, Scheduling, generate_request
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc


class AsyncClient:
    """`neo_client.Client` for asyncio; one event loop uses it.

    Failed calls raise grpc.aio.AioRpcError; cancelling a task cancels its request.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        token: Token | None = None,
        retries: Retries | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """See `neo_client.connect.Connection`. Raises ValueError."""
        self.connection = Connection(
            address, tls=tls, token=token, retries=retries, credentials=credentials
        )
        self.channel = self.connection.open_aio()
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)

    def _call(self, timeout: float | None = QUESTION_SECONDS) -> dict[str, Any]:
        return {"timeout": timeout, "metadata": self.connection.metadata()}

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        sampling: Sampling | None = None,
        scheduling: Scheduling | None = None,
        deadline_seconds: float | None = None,
        **flags: bool,
    ) -> inference.GenerateResponse:
        """See `Client.generate`."""
        request = generate_request(
            prompt, model=model, request_id=request_id, sampling=sampling, scheduling=scheduling,
            **flags,
        )  # fmt: skip
        answer: inference.GenerateResponse = await self._stub.Generate(
            request, **self._call(deadline_seconds)
        )
        return answer

    async def stream(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        sampling: Sampling | None = None,
        scheduling: Scheduling | None = None,
        deadline_seconds: float | None = None,
        **flags: bool,
    ) -> AsyncGenerator[inference.GenerateStreamResponse]:
        """Messages as they come; `aclose` of the generator cancels the request."""
        request = generate_request(
            prompt, model=model, request_id=request_id, sampling=sampling, scheduling=scheduling,
            **flags,
        )  # fmt: skip
        call = self._stub.GenerateStream(request, **self._call(deadline_seconds))
        try:
            async for message in call:
                yield message
        finally:
            call.cancel()

    async def abort(self, request_id: str) -> None:
        request = inference.AbortRequest(request_id=request_id)
        await self._stub.Abort(request, **self._call())

    async def models(self) -> list[inference.Model]:
        answer = await self._stub.ListModels(inference.ListModelsRequest(), **self._call())
        return list(answer.models)

    async def model(self, name: str = "") -> inference.Model:
        request = inference.GetModelRequest(model=name)
        model: inference.Model = (await self._stub.GetModel(request, **self._call())).model
        return model

    async def tokenize(
        self, prompt: Prompt, *, model: str = "", skip_special_tokens: bool = False
    ) -> list[int]:
        request = tokenize_request(prompt, model, skip_special_tokens)
        return list((await self._stub.Tokenize(request, **self._call())).token_ids)

    async def detokenize(
        self, token_ids: list[int], *, model: str = "", include_special_tokens: bool = False
    ) -> str:
        request = inference.DetokenizeRequest(
            model=model, token_ids=token_ids, include_special_tokens=include_special_tokens
        )
        return str((await self._stub.Detokenize(request, **self._call())).text)

    async def close(self) -> None:
        await self.channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
