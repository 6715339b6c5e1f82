"""Plugs OpenAI's API into a gpu_service: its calls go to the servicer that gRPC's calls go to."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message_factory import GetMessageClass
from prometheus_client import CollectorRegistry

from gpu_service.config import GpuServiceConfig
from gpu_service.frontend.inference import InferenceServicer
from neo_common.grpc.server import ServiceServer
from neo_http.app import Parts
from neo_http.call import HttpCall
from neo_http.listener import HttpListener
from neo_http.metrics import HttpMetrics
from protos.neo.v1 import inference_pb2

_METHODS = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name


def http_listener(
    config: GpuServiceConfig,
    servicer: InferenceServicer,
    server: ServiceServer,
    serving: Callable[[], bool],
    registry: CollectorRegistry,
) -> HttpListener:
    """serving: whether requests are taken. Raises ValueError for key files."""

    async def inference(
        method: str, request: bytes, call: HttpCall, send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        about = _METHODS[method]
        message = GetMessageClass(about.input_type).FromString(request)
        answer: Any = getattr(servicer, method)(message, call)
        if not about.server_streaming:
            await send((await answer).SerializeToString())
            return
        async with contextlib.aclosing(answer):  # at once when the client hangs up, not some time
            async for each in answer:
                await send(each.SerializeToString())

    parts = Parts(
        inference=inference,
        access=server.access,
        admitted=server.guard.admitted,
        healthy=serving,
        settings=config,
        metrics=HttpMetrics(registry),
    )
    return HttpListener(parts, config.tls, config.max_connection_age_seconds)
