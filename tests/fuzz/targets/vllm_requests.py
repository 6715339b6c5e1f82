"""Requests of vllm.grpc.engine.VllmEngine, translated to neo.v1 and checked as such."""

from __future__ import annotations

from typing import Any, cast

from gpu_service.frontend.compat import vllm_messages
from gpu_service.frontend.compat.vllm import VllmEngineServicer
from protos.compat import vllm_engine_pb2 as pb
from tests.fuzz.front import MODEL, SPEC, harness, parse, request_of, servicer, tokenizer, wait
from tests.fuzz.target import Target


def _handle(data: bytes) -> None:
    request = request_of(pb.GenerateRequest, data)
    nothing: Any = None
    engine = VllmEngineServicer(servicer(), tokenizer(), SPEC, "tiny", nothing, nothing, 8)
    ids = wait(engine._prompt(request, MODEL))
    parse(vllm_messages.generate_request(request, ids))


def seeds() -> list[bytes]:
    params = pb.SamplingParams(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, frequency_penalty=0.5, presence_penalty=0.5,
        repetition_penalty=1.1, max_tokens=7, min_tokens=1, stop=["x"], stop_token_ids=[4], n=2,
        seed=11, logprobs=2, prompt_logprobs=1, logit_bias={3: 2.0}, truncate_prompt_tokens=4,
        skip_special_tokens=True,
    )  # fmt: skip
    tokens = pb.TokenizedInput(original_text="a", input_ids=[1, 2, 3])
    messages = [
        pb.GenerateRequest(request_id="r", tokenized=tokens, sampling_params=params, stream=True),
        pb.GenerateRequest(text="Once upon", sampling_params=pb.SamplingParams(regex="a+")),
        pb.GenerateRequest(text="Once", sampling_params=pb.SamplingParams(ignore_eos=True)),
    ]
    return [cast(bytes, each.SerializeToString()) for each in messages]


TARGET = Target("vllm_requests", harness(_handle), seeds, "wire")
