"""vllm.grpc.engine.VllmEngine: token ids in, token ids out. A thin face of InferenceService."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from gpu_service.frontend import validate
from gpu_service.frontend.compat import vllm_messages
from gpu_service.frontend.compat.tokenizer_files import Archive, build_archive
from gpu_service.frontend.inference import InferenceServicer
from gpu_service.frontend.validate import ServedModel, invalid
from gpu_service.model.tokenizer import Tokenizer
from neo_common.errors import Reason, ServiceError
from neo_common.model_spec import ModelSpec
from protos.compat import smg_common_pb2 as common
from protos.compat import vllm_engine_pb2 as pb
from protos.compat import vllm_engine_pb2_grpc as pb_grpc
from protos.neo.v1 import engine_pb2
from protos.neo.v1 import inference_pb2 as neo

Context = Any
SERVER_TYPE = "neo-serving"
CHUNK_BYTES = 64 << 10
"""Of the tokenizer's archive in one message; what SMG's servicers send."""


class VllmEngineServicer(pb_grpc.VllmEngineServicer):
    """inference: takes the requests. load: the newest snapshot. info: filled in when ready."""

    def __init__(
        self,
        inference: InferenceServicer,
        tokenizer: Tokenizer,
        spec: ModelSpec,
        model: str,
        info: engine_pb2.GetInfoResponse,
        load: Callable[[], engine_pb2.LoadSnapshot],
        max_running_requests: int,
    ) -> None:
        self._inference = inference
        self._tokenizer = tokenizer
        self._spec = spec
        self._model = model
        self._info = info
        self._load = load
        self._max_running_requests = max_running_requests
        self._started = time.monotonic()
        self._last_request = 0.0
        self._archive: asyncio.Task[Archive] | None = None

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        self._last_request = time.time()
        params = request.sampling_params
        ids = await self._prompt(request, self._inference.served())
        translated = vllm_messages.generate_request(request, ids)
        answer = vllm_messages.Answer(
            ids,
            request.stream,
            params.logprobs if params.HasField("logprobs") else None,
            params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        )
        async for message in self._inference.GenerateStream(translated, context):
            for out in answer.take(message):
                yield out

    async def _prompt(self, request: pb.GenerateRequest, model: ServedModel) -> list[int]:
        kind = request.WhichOneof("input")
        if kind is None:
            raise invalid("input", "is missing: set tokenized or text")
        if kind == "text":
            ids = await validate.encode_text(self._tokenizer, request.text, model, special=True)
        else:
            ids = list(request.tokenized.input_ids)
        longest = model.max_context_tokens - 1
        return list(vllm_messages.truncated(ids, request.sampling_params, longest))

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: Context
    ) -> pb.HealthCheckResponse:
        state = self._load().state
        healthy = state == engine_pb2.ENGINE_STATE_SERVING
        said = engine_pb2.EngineState.Name(state).removeprefix("ENGINE_STATE_").lower()
        return pb.HealthCheckResponse(healthy=healthy, message=said)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        for identity in request.request_ids:
            try:
                await self._inference.Abort(neo.AbortRequest(request_id=identity), context)
            except ServiceError as error:
                if error.reason is not Reason.REQUEST_NOT_FOUND:
                    raise
        return pb.AbortResponse()

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        served, spec = self._inference.served(), self._spec
        bos = spec.bos_token_id
        return pb.GetModelInfoResponse(
            model_path=self._model,
            tokenizer_path=self._model,
            served_model_name=served.name,
            is_generation=True,
            max_context_length=served.max_context_tokens,
            max_req_input_len=served.max_context_tokens - 1,
            vocab_size=spec.vocab_size,
            model_type=spec.family,
            eos_token_ids=spec.eos_token_ids,
            bos_token_id=-1 if bos is None else bos,
            pad_token_id=-1,
            default_sampling_params_json="{}",
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        load = self._load()
        return pb.GetServerInfoResponse(
            active_requests=_running(load) + load.waiting_requests,
            is_paused=load.state == engine_pb2.ENGINE_STATE_DRAINING,
            last_receive_timestamp=self._last_request,
            uptime_seconds=time.monotonic() - self._started,
            server_type=SERVER_TYPE,
            data_parallel_size=1,
            kv_cache_dtype="auto",
            block_size=load.block_tokens,
            model_dtype=self._info.dtype,
            max_num_seqs=self._max_running_requests,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        if request.dp_rank != 0:
            raise invalid("dp_rank", f"is {request.dp_rank}; the only rank is 0")
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=self._info.version,
            dp_rank_count=1,
            loads=[scheduler_load(self._load())],
        )

    async def GetTokenizer(
        self, request: common.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[common.GetTokenizerChunk]:
        if self._archive is None:  # built once, whoever asks; a failed build is tried again
            self._archive = asyncio.create_task(asyncio.to_thread(build_archive, self._model))
        building = self._archive
        try:
            archive = await asyncio.shield(building)
        except (OSError, ValueError):
            self._archive = None
            raise
        last = max(len(archive.data) - 1, 0) // CHUNK_BYTES
        for number in range(last + 1):
            yield common.GetTokenizerChunk(
                data=archive.data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES],
                sha256=archive.sha256 if number == last else "",
            )


def scheduler_load(load: engine_pb2.LoadSnapshot) -> pb.SchedulerLoad:
    """Tokens count KV room of both tiers."""
    total = load.gpu.total_blocks + load.host.total_blocks
    used = total - load.gpu.free_blocks - load.host.free_blocks
    running = _running(load)
    return pb.SchedulerLoad(
        num_running_reqs=running,
        num_waiting_reqs=load.waiting_requests,
        num_total_reqs=running + load.waiting_requests,
        num_used_tokens=used * load.block_tokens,
        max_total_num_tokens=total * load.block_tokens,
        token_usage=used / total if total else 0.0,
        gen_throughput=load.output_tokens_per_second,
        num_waiting_uncached_tokens=load.waiting_prompt_tokens,
    )


def _running(load: engine_pb2.LoadSnapshot) -> int:
    return load.gpu.running_requests + load.host.running_requests
