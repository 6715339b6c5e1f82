"""Requests of neo.v1.InferenceService, from their bytes to the engine's command."""

from __future__ import annotations

from typing import Any

from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import types_pb2 as types
from tests.fuzz.front import harness, parse, request_of, servicer, wait
from tests.fuzz.target import Target

_KINDS: dict[int, Any] = {
    1: pb.TokenizeRequest,
    2: pb.DetokenizeRequest,
    3: pb.GetModelRequest,
    4: pb.AbortRequest,
}
"""First byte -> what follows; GenerateRequest behind all others."""
_METHODS = {1: "Tokenize", 2: "Detokenize", 3: "GetModel", 4: "Abort"}


def _handle(data: bytes) -> None:
    kind = data[0] if data else 0
    if kind not in _KINDS:
        parse(request_of(pb.GenerateRequest, data[1:]))
        return
    request = request_of(_KINDS[kind], data[1:])
    answer = wait(getattr(servicer(), _METHODS[kind])(request, None))
    answer.SerializeToString()


def seeds() -> list[bytes]:
    sampling = types.SamplingParams(
        temperature=0.7, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=0.5, frequency_penalty=-0.5, seed=7, logit_bias={5: 1.5, 6: -100},
        max_tokens=9, min_tokens=2, stop=["END", "\n\n"], stop_token_ids=[3, 4], n=2, logprobs=3,
        prompt_logprobs=1,
    )  # fmt: skip
    scheduling = types.SchedulingParams(
        placement=types.PLACEMENT_CPU_PREFERRED, priority=-5, ttft_ms=200, tpot_ms=50,
        cache_salt="salt",
    )  # fmt: skip
    chat = types.Chat(
        messages=[
            types.ChatMessage(role="system", content="Be brief."),
            types.ChatMessage(role="user", content="Why is the sky blue?"),
        ]
    )
    generate = [
        pb.GenerateRequest(
            request_id="a", model="tiny", text="Once upon a time", sampling=sampling
        ),
        pb.GenerateRequest(token_ids=types.TokenIds(ids=[1, 2, 300]), scheduling=scheduling),
        pb.GenerateRequest(chat=chat, sampling=sampling, include_special_tokens=True),
    ]
    found = [b"\0" + each.SerializeToString() for each in generate]
    found.append(b"\1" + pb.TokenizeRequest(model="tiny", text="a b").SerializeToString())
    found.append(b"\1" + pb.TokenizeRequest(chat=chat).SerializeToString())
    ids = pb.DetokenizeRequest(token_ids=[1, 256, 319], token_bytes=True)
    found.append(b"\2" + ids.SerializeToString())
    found.append(b"\3" + pb.GetModelRequest(model="tiny").SerializeToString())
    found.append(b"\4" + pb.AbortRequest(request_id="a").SerializeToString())
    return found


TARGET = Target("neo_requests", harness(_handle), seeds, "wire")
