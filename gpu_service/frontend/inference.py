"""InferenceService: message -> request -> engine -> message."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from msgspec import structs

from gpu_service.frontend import validate
from gpu_service.frontend.dispatch import Dispatcher
from gpu_service.frontend.metrics import FrontendMetrics
from gpu_service.frontend.observed import count_errors, observe
from gpu_service.frontend.structured import grammar_of
from gpu_service.frontend.validate import ServedModel, invalid
from gpu_service.model.structured import GrammarChecker
from gpu_service.model.tokenizer import Tokenizer
from neo_common.errors import Reason, ServiceError
from neo_common.model_spec import ModelSpec
from neo_common.tracing import NO_TRACES, Tracer
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import inference_pb2_grpc as pb_grpc

Context = Any


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Answers NOT_READY until `ready` is called."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        dispatcher: Dispatcher,
        metrics: FrontendMetrics,
        tracer: Tracer = NO_TRACES,
    ) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._tracer = tracer
        self._grammars = GrammarChecker(tokenizer, spec.vocab_size)
        self._model: ServedModel | None = None
        self._dtype = ""

    def ready(self, model: ServedModel, dtype: str) -> None:
        self._model = model
        self._dtype = dtype

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        choices: dict[int, pb.Choice] = {}
        response = pb.GenerateResponse(model=self.served().name)
        async for message in self.GenerateStream(request, context):
            response.request_id = message.request_id
            response.prompt_logprobs.extend(message.prompt_logprobs)
            for delta in message.deltas:
                _join(choices.setdefault(delta.index, pb.Choice(index=delta.index)), delta)
            if message.HasField("usage"):
                response.usage.CopyFrom(message.usage)
        response.choices.extend(choices[index] for index in sorted(choices))
        return response

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        metadata = context.invocation_metadata()
        with count_errors(self._metrics), self._tracer.call("generate", metadata) as span:
            parsed = await validate.parse_request(
                request,
                self.served(),
                self._tokenizer,
                now=time.monotonic(),
                seconds_left=context.time_remaining(),
                grammar=await grammar_of(request.sampling, self._grammars),
            )
            submit = parsed.submit
            if span.recording:
                parsed = replace(parsed, submit=structs.replace(submit, traced=True))
            with observe(self._metrics, submit, span) as observed:
                async with self._dispatcher.open(parsed) as live:
                    async for update in live:
                        observed.take_in(update)
                        yield pb.GenerateStreamResponse(
                            request_id=submit.request_id,
                            deltas=update.choices,
                            usage=update.usage,
                            prompt_logprobs=update.prompt_logprobs,
                        )

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        if not request.request_id:
            raise invalid("request_id", "is empty")
        await self._dispatcher.abort(request.request_id)
        return pb.AbortResponse()

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[self._describe()])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        validate.check_model(request.model, self.served())
        return pb.GetModelResponse(model=self._describe())

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        model = self.served()
        validate.check_model(request.model, model)
        kind = request.WhichOneof("input")
        if kind is None:
            raise invalid("input", "is missing: set text or chat")
        if kind == "chat":
            ids = await validate.encode_chat(self._tokenizer, request.chat, model)
        else:
            special = not request.skip_special_tokens
            ids = await validate.encode_text(self._tokenizer, request.text, model, special=special)
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        model = self.served()
        validate.check_model(request.model, model)
        ids = validate.prompt_ids("token_ids", request.token_ids, model)
        text = self._tokenizer.decode(ids, skip_special_tokens=not request.include_special_tokens)
        pieces = [self._tokenizer.token_bytes(i) for i in ids] if request.token_bytes else ()
        return pb.DetokenizeResponse(text=text, token_bytes=pieces)

    def served(self) -> ServedModel:
        """Raises ServiceError (NOT_READY) while the model is loading."""
        if self._model is None:
            raise ServiceError(Reason.NOT_READY, "the model is still loading", retry_after=2.0)
        return self._model

    def _describe(self) -> pb.Model:
        model = self.served()
        return pb.Model(
            name=model.name,
            family=self._spec.family,
            vocab_size=self._spec.vocab_size,
            max_context_tokens=model.max_context_tokens,
            dtype=self._dtype,
            has_chat_template=self._tokenizer.has_chat_template,
            eos_token_ids=self._spec.eos_token_ids,
        )


def _join(choice: pb.Choice, delta: pb.Choice) -> None:
    text = choice.text + delta.text
    choice.MergeFrom(delta)
    choice.text = text
