"""inference.GRPCInferenceService (Open Inference Protocol v2, with Triton's additions).

A thin face of InferenceService; the model is described as one of Triton's decoupled models.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

from gpu_service.frontend import validate
from gpu_service.frontend.compat import kserve_messages as messages
from gpu_service.frontend.inference import InferenceServicer
from gpu_service.frontend.validate import invalid
from neo_common.errors import Reason, ServiceError
from neo_common.grpc.guard import Malformed
from neo_common.version import version
from protos.compat import kserve_pb2 as pb
from protos.compat import kserve_pb2_grpc as pb_grpc

Context = Any
SERVER_NAME = "neo-serving"
PLATFORM = "neo"
VERSION = "1"
"""Of every model: a service serves one, in one version."""
MAX_AT_ONCE = 256
"""Requests of one stream under way; its next one is read when one of them ends."""

_TYPES = {
    "BOOL": pb.TYPE_BOOL,
    "INT32": pb.TYPE_INT32,
    "UINT32": pb.TYPE_UINT32,
    "FP32": pb.TYPE_FP32,
    "BYTES": pb.TYPE_STRING,
}


def _inputs() -> list[tuple[str, str, int]]:
    """(name, datatype, elements; -1: any number)."""
    found = [(messages.PROMPT, "BYTES", 1), (messages.PROMPT_IDS, "INT32", -1)]
    found.append((messages.JSON_PARAMETERS, "BYTES", 1))
    found += [(name, "BOOL", 1) for name in sorted(messages.SWITCHES)]
    for name, kind in messages.SAMPLING.items():
        found.append((name, messages.DATATYPES[kind], -1 if name in messages.LISTS else 1))
    return found


class KserveServicer(pb_grpc.GRPCInferenceServiceServicer):
    """ready: whether requests are taken now. admitted: a request runs inside it (it counts as live,
    and none is let in while the service drains)."""

    def __init__(
        self,
        inference: InferenceServicer,
        ready: Callable[[], bool],
        admitted: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._inference = inference
        self._ready = ready
        self._admitted = admitted

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        if not self._ready():
            return pb.ModelReadyResponse(ready=False)
        self._check(request.name, request.version)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        extensions = ["model_configuration", "model_repository", "parameters"]
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=version(), extensions=extensions)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=self._check(request.name, request.version),
            versions=[VERSION],
            platform=PLATFORM,
            inputs=[
                tensor(name=name, datatype=kind, shape=[size]) for name, kind, size in _inputs()
            ],
            outputs=[
                tensor(name=name, datatype=kind, shape=[-1])
                for name, kind in messages.OUTPUTS.items()
            ],
        )

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        config = pb.ModelConfig(
            name=self._check(request.name, request.version),
            platform=PLATFORM,
            backend=PLATFORM,
            input=[
                pb.ModelInput(name=name, data_type=_TYPES[kind], dims=[size], optional=True)
                for name, kind, size in _inputs()
            ],
            output=[
                pb.ModelOutput(name=name, data_type=_TYPES[kind], dims=[-1])
                for name, kind in messages.OUTPUTS.items()
            ],
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
        return pb.ModelConfigResponse(config=config)

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        if request.repository_name:
            raise invalid("repository_name", "must be empty: there is one repository")
        answer = pb.RepositoryIndexResponse()
        ready = self._ready()
        if ready or not request.ready:
            answer.models.add(
                name=self._inference.served().name,
                version=VERSION,
                state="READY" if ready else "UNAVAILABLE",
                reason="" if ready else "draining",
            )
        return answer

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        question = messages.read_question(request)
        if question.stream:
            raise invalid("stream", "needs ModelStreamInfer")
        answers: list[pb.ModelInferResponse] = []

        async def keep(answer: pb.ModelInferResponse) -> None:
            answers.append(answer)

        await self._run(request, question, context, keep)
        answers[0].parameters.clear()
        return answers[0]

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> None:
        """A failed request is told by its error_message; the others of the stream go on."""
        room = asyncio.Semaphore(MAX_AT_ONCE)
        writing = asyncio.Lock()

        async def write(message: pb.ModelStreamInferResponse) -> None:
            async with writing:
                await context.write(message)

        async def run(request: pb.ModelInferRequest) -> None:
            async def pass_on(answer: pb.ModelInferResponse) -> None:
                await write(pb.ModelStreamInferResponse(infer_response=answer))

            try:
                with self._admitted():
                    question = messages.read_question(request)
                    await self._run(request, question, context, pass_on)
            except ServiceError as error:
                about = pb.ModelInferResponse(id=request.id)
                about.parameters[messages.FINAL].bool_param = True
                said = f"[{error.reason}] {error.message}"
                await write(pb.ModelStreamInferResponse(error_message=said, infer_response=about))
            finally:
                room.release()

        broken: Malformed | None = None
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                if isinstance(request, Malformed):
                    broken = request
                    break
                await room.acquire()
                group.create_task(run(request))
        if broken is not None:
            raise broken.error()

    async def _run(
        self,
        request: pb.ModelInferRequest,
        question: messages.Question,
        context: Context,
        send: Callable[[pb.ModelInferResponse], Awaitable[None]],
    ) -> None:
        name = self._check(request.model_name, request.model_version)
        answer = messages.Answer(question, name)
        async for message in self._inference.GenerateStream(question.request, context):
            for out in answer.take(message):
                await send(out)

    def _check(self, name: str, model_version: str) -> str:
        """The model's name. Raises ServiceError where another model or version is meant."""
        served = self._inference.served()
        validate.check_model(name, served)
        if model_version not in ("", VERSION):
            raise ServiceError(
                Reason.UNKNOWN_MODEL,
                f"version {model_version!r} of {served.name} is not served here ({VERSION} is)",
                field="version",
            )
        return served.name
