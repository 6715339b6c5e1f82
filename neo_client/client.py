"""The synchronous client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from neo_client.connect import Connection, Retries, Tls, Token
from neo_client.options import (
    Prompt,
    Sampling,
    Scheduling,
    chat_of,
    generate_request,
    is_chat,
)
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc

QUESTION_SECONDS = 30.0
"""Deadline of calls that do not generate."""


class Client:
    """Calls neo.v1.InferenceService of a router or a gpu_service. Thread-safe; `close` it.

    Failed calls raise grpc.RpcError; `neo_common.errors.ErrorDetails` reads reason, fields and
    retry delay from it. `deadline_seconds` bounds the whole call; None means no limit.
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
        self.channel = self.connection.open()
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)

    def _call(self, timeout: float | None = QUESTION_SECONDS) -> dict[str, Any]:
        return {"timeout": timeout, "metadata": self.connection.metadata()}

    def generate(
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
        """All choices at once. `flags`: `include_special_tokens`, `token_ids_only`."""
        request = generate_request(
            prompt, model=model, request_id=request_id, sampling=sampling, scheduling=scheduling,
            **flags,
        )  # fmt: skip
        answer: inference.GenerateResponse = self._stub.Generate(
            request, **self._call(deadline_seconds)
        )
        return answer

    @contextlib.contextmanager
    def stream(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        sampling: Sampling | None = None,
        scheduling: Scheduling | None = None,
        deadline_seconds: float | None = None,
        **flags: bool,
    ) -> Iterator[Iterator[inference.GenerateStreamResponse]]:
        """Messages as they come; leaving the block before their end cancels the request.

        with client.stream("Once") as messages:
            for message in messages:
                print(message.deltas[0].text, end="")
        """
        request = generate_request(
            prompt, model=model, request_id=request_id, sampling=sampling, scheduling=scheduling,
            **flags,
        )  # fmt: skip
        call: Any = self._stub.GenerateStream(request, **self._call(deadline_seconds))
        try:
            yield call
        finally:
            call.cancel()

    def abort(self, request_id: str) -> None:
        self._stub.Abort(inference.AbortRequest(request_id=request_id), **self._call())

    def models(self) -> list[inference.Model]:
        answer = self._stub.ListModels(inference.ListModelsRequest(), **self._call())
        return list(answer.models)

    def model(self, name: str = "") -> inference.Model:
        """The model called `name`, or the default one."""
        request = inference.GetModelRequest(model=name)
        model: inference.Model = self._stub.GetModel(request, **self._call()).model
        return model

    def tokenize(
        self, prompt: Prompt, *, model: str = "", skip_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of a text, or of a chat rendered with the model's template."""
        request = tokenize_request(prompt, model, skip_special_tokens)
        return list(self._stub.Tokenize(request, **self._call()).token_ids)

    def detokenize(
        self, token_ids: list[int], *, model: str = "", include_special_tokens: bool = False
    ) -> str:
        request = inference.DetokenizeRequest(
            model=model, token_ids=token_ids, include_special_tokens=include_special_tokens
        )
        return str(self._stub.Detokenize(request, **self._call()).text)

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def tokenize_request(
    prompt: Prompt, model: str, skip_special_tokens: bool
) -> inference.TokenizeRequest:
    """Raises ValueError for token ids, which need no tokenizer."""
    request = inference.TokenizeRequest(model=model, skip_special_tokens=skip_special_tokens)
    if isinstance(prompt, str):
        request.text = prompt
        return request
    if not is_chat(prompt):
        raise ValueError("prompt must be text or chat messages")
    request.chat.CopyFrom(chat_of(prompt))
    return request
