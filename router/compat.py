"""The protocols of other engines' clients on the router: bytes passed on, but for what is the
router's own to say, and streams of many requests.

    client ══ModelStreamInfer══> router ──> a backend      each request of the stream is a call of
           <════════════════════        ──> another one    its own; answers carry the request's id
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from neo_common.errors import ServiceError
from neo_common.version import version
from protos.compat import kserve_pb2 as kserve
from protos.compat import vllm_engine_pb2 as vllm
from router.forward import Forwarder
from router.relay import Context, Failure

VLLM = vllm.DESCRIPTOR.services_by_name["VllmEngine"]
KSERVE = kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICES = (VLLM, KSERVE)
GENERATING = frozenset({f"/{VLLM.full_name}/Generate", f"/{KSERVE.full_name}/ModelInfer"})
"""What a drain waits for, beside requests on streams."""
LOADS = f"/{VLLM.full_name}/GetLoads"
STREAM = f"/{KSERVE.full_name}/ModelStreamInfer"
MAX_AT_ONCE = 256
"""Requests of one stream under way; its next one is read when one of them ends."""

Admitted = Callable[[], AbstractContextManager[None]]


def handlers(
    forwarder: Forwarder, usable: Callable[[], bool], admitted: Admitted
) -> tuple[grpc.GenericRpcHandler[Any, Any], ...]:
    """usable: whether a backend can take calls. admitted: see neo_common.grpc.guard."""

    def said(answer: Callable[[], Any]) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(request: bytes, context: Context) -> bytes:
            message: bytes = answer().SerializeToString()
            return message

        return grpc.unary_unary_rpc_method_handler(handle)

    def health() -> vllm.HealthCheckResponse:
        if usable():
            return vllm.HealthCheckResponse(healthy=True, message="serving")
        return vllm.HealthCheckResponse(message="no backend can take calls now")

    return (
        forwarder.handler(
            VLLM,
            {
                "HealthCheck": said(health),
                "GetLoads": grpc.unary_unary_rpc_method_handler(_loads(forwarder)),
            },
        ),
        forwarder.handler(
            KSERVE,
            {
                "ServerLive": said(lambda: kserve.ServerLiveResponse(live=True)),
                "ServerReady": said(lambda: kserve.ServerReadyResponse(ready=usable())),
                "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                    _stream(forwarder, admitted)
                ),
            },
        ),
    )


def _loads(forwarder: Forwarder) -> Callable[[bytes, Context], Awaitable[bytes]]:
    """Each backend's load as a rank of its own."""

    async def handle(request: bytes, context: Context) -> bytes:
        merged = vllm.GetLoadsResponse(timestamp=datetime.now(UTC).isoformat(), version=version())
        for answer in await forwarder.ask_all(LOADS, request, context):
            if isinstance(answer, Failure):
                continue
            for load in vllm.GetLoadsResponse.FromString(answer).loads:
                load.dp_rank = len(merged.loads)
                merged.loads.append(load)
        merged.dp_rank_count = len(merged.loads)
        return merged.SerializeToString()

    return handle


def _stream(
    forwarder: Forwarder, admitted: Admitted
) -> Callable[[AsyncIterator[bytes], Context], Awaitable[None]]:
    async def handle(requests: AsyncIterator[bytes], context: Context) -> None:
        room = asyncio.Semaphore(MAX_AT_ONCE)
        writing = asyncio.Lock()

        async def write(message: bytes) -> None:
            async with writing:
                await context.write(message)

        async def run(request: bytes) -> None:
            try:
                with admitted():
                    failure = await forwarder.relay(STREAM, request, context, write)
                if failure is not None:
                    await write(_problem(request, failure.details))
            except ServiceError as error:
                await write(_problem(request, f"[{error.reason}] {error.message}"))
            finally:
                room.release()

        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await room.acquire()
                group.create_task(run(request))

    return handle


def _problem(request: bytes, message: str) -> bytes:
    """The protocol's way to say that one request of a stream failed."""
    try:
        identity = kserve.ModelInferRequest.FromString(request).id
    except DecodeError:
        identity = ""
    about = kserve.ModelInferResponse(id=identity)
    about.parameters["triton_final_response"].bool_param = True
    answer = kserve.ModelStreamInferResponse(error_message=message, infer_response=about)
    return answer.SerializeToString()
