"""What is behind the address: model, backends, and the servers' own metrics before and after."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from prometheus_client.parser import text_string_to_metric_families

from neo_client.aio import AsyncClient
from neo_client.bench.sample import Sample
from neo_client.connect import Connection
from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import engine_pb2_grpc, router_pb2_grpc
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import router_pb2 as router

QUESTION_SECONDS = 10.0
HIDDEN = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)
"""Operators' calls are not for everybody, nor on every port."""
METRICS = {
    "requests": ("vllm:e2e_request_latency_seconds_count",),
    "first_tokens": ("vllm:time_to_first_token_seconds_count",),
    "prompt_tokens": ("vllm:prompt_tokens_total",),
    "output_tokens": ("vllm:generation_tokens_total",),
    "ttft_seconds": ("vllm:time_to_first_token_seconds_sum",),
    "e2e_seconds": ("vllm:e2e_request_latency_seconds_sum",),
}
"""Ours -> the server's sample, summed over labels and servers."""


async def model_of(client: AsyncClient, name: str) -> inference.Model:
    return await client.model(name)


async def describe(connection: Connection) -> dict[str, Any]:
    """Plain values about the backends; empty where the caller may not know."""
    async with connection.open_aio() as channel:
        call = {"timeout": QUESTION_SECONDS, "metadata": connection.metadata()}
        info = await _ask(
            engine_pb2_grpc.EngineServiceStub(channel).GetInfo, engine.GetInfoRequest(), call
        )
        if info is not None:
            names = (
                "version", "model", "device", "device_name", "offload", "offload_transport",
                "dtype", "host_kv_dtype", "max_context_tokens", "config",
            )  # fmt: skip
            return {"engine": {name: getattr(info, name) for name in names}}
        listed = await _ask(
            router_pb2_grpc.RouterServiceStub(channel).ListBackends,
            router.ListBackendsRequest(), call,
        )  # fmt: skip
        if listed is None:
            return {}
        return {"backends": [_backend(each) for each in listed.backends]}


async def _ask(method: Any, request: Any, call: dict[str, Any]) -> Any:
    try:
        return await method(request, **call)
    except grpc.aio.AioRpcError as error:
        if error.code() in HIDDEN:
            return None
        raise


def _backend(backend: router.Backend) -> dict[str, Any]:
    load = backend.load
    return {
        "address": backend.address,
        "state": router.BackendState.Name(backend.state).removeprefix("BACKEND_STATE_"),
        "gpu_blocks": load.gpu.total_blocks,
        "host_blocks": load.host.total_blocks,
        "block_tokens": load.block_tokens,
        "instance": load.instance_id,
    }


async def scrape(urls: Sequence[str]) -> Counter[str]:
    """The samples of all servers, summed over labels. ValueError for a URL that does not answer."""
    pages = await asyncio.gather(*(asyncio.to_thread(_read, url) for url in urls))
    found: Counter[str] = Counter()
    for page in pages:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                found[sample.name] += sample.value  # type: ignore[assignment]
    return found


def _read(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"metrics-url must be http:// or https://, not {url!r}")
    try:
        with urllib.request.urlopen(url, timeout=QUESTION_SECONDS) as answer:
            return str(answer.read().decode("utf-8"))
    except (urllib.error.URLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"metrics-url {url}: {error}") from None


def agreement(
    before: Counter[str], after: Counter[str], samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    """Our sums over all requests, those of the warm-up included, beside the servers'. A sum that
    differs by more than the way between us means that one of us measures something else, or that
    others used the servers, too."""
    ended = [sample for sample in samples if sample.ok]
    ours = {
        "requests": len(ended),
        "first_tokens": sum(sample.first is not None for sample in ended),
        "prompt_tokens": sum(sample.prompt_tokens for sample in ended),
        "output_tokens": sum(sample.tokens for sample in ended),
        "ttft_seconds": sum(s.sent_ttft for s in ended if s.sent_ttft is not None),
        "e2e_seconds": sum(sample.sent_e2e for sample in ended),
    }
    rows = []
    for name, (metric,) in METRICS.items():
        theirs = after[metric] - before[metric]
        rows.append(
            {
                "what": name,
                "client": round(ours[name], 4),
                "server": round(theirs, 4),
                "difference_percent": round(100 * (ours[name] / theirs - 1), 3) if theirs else None,
            }
        )
    return rows
