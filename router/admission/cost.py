"""What a request will take, out of its bytes, and what it took, out of its answer's last message.

| request | prompt tokens | output tokens | used |
| --- | --- | --- | --- |
| neo.v1, token ids | exact | n * max_tokens | usage of the last message |
| neo.v1, text or chat | bytes / bytes_per_token | the same | the same |
| vLLM | the same two | the same | the last message, where n is 1 |
| KServe | the message's bytes / bytes_per_token | max_tokens among its parameters | not known |

A request without max_tokens counts for `default_output_tokens` of output a choice, none for more
than `max_output_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from neo_common.grpc.principal import PRIORITY_KEY
from protos.compat import kserve_pb2 as kserve
from protos.compat import vllm_engine_pb2 as vllm
from protos.neo.v1 import inference_pb2 as inference
from router.admission.policy import SharedLimits

MAX_PRIORITY = 100
MAX_CHOICES = 16
"""Engines refuse more."""


@dataclass(frozen=True)
class Cost:
    """Of one request, in tokens."""

    prompt_tokens: float = 0.0
    output_tokens: float | None = None
    """Of each choice; None: the request does not say."""
    choices: int = 1

    def total(self, shared: SharedLimits) -> float:
        output = self.output_tokens
        if output is None:
            output = float(shared.default_output_tokens)
        output = min(max(output, 0.0), shared.max_output_tokens)
        return max(1.0, self.prompt_tokens + output * min(self.choices, MAX_CHOICES))


@dataclass(frozen=True)
class Asked:
    cost: Cost
    priority: int = 0


def _text_tokens(size: int, shared: SharedLimits) -> float:
    return size / shared.bytes_per_token


def _neo(data: bytes, shared: SharedLimits) -> Asked:
    request = inference.GenerateRequest.FromString(data)
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        prompt = float(len(request.token_ids.ids))
    else:
        size = len(request.text.encode()) if kind == "text" else request.chat.ByteSize()
        prompt = _text_tokens(size, shared)
    sampling = request.sampling
    return Asked(_cost(prompt, sampling, sampling.n), request.scheduling.priority)


def _vllm(data: bytes, shared: SharedLimits) -> Asked:
    request = vllm.GenerateRequest.FromString(data)
    if request.WhichOneof("input") == "tokenized":
        prompt = float(len(request.tokenized.input_ids))
    else:
        prompt = _text_tokens(len(request.text.encode()), shared)
    sampling = request.sampling_params
    return Asked(_cost(prompt, sampling, sampling.n))


def _kserve(data: bytes, shared: SharedLimits) -> Asked:
    request = kserve.ModelInferRequest.FromString(data)
    output = None
    if "max_tokens" in request.parameters:
        output = float(request.parameters["max_tokens"].int64_param)
    return Asked(Cost(_text_tokens(len(data), shared), output))


def _cost(prompt: float, sampling: Any, n: int) -> Cost:
    choices = max(1, n)
    if not sampling.HasField("max_tokens"):
        return Cost(prompt, None, choices)
    return Cost(prompt, float(sampling.max_tokens), choices)


def _neo_used(usage: Any) -> float | None:
    return float(usage.prompt_tokens + usage.completion_tokens) or None


def _neo_stream_used(data: bytes) -> float | None:
    return _neo_used(inference.GenerateStreamResponse.FromString(data).usage)


def _neo_unary_used(data: bytes) -> float | None:
    return _neo_used(inference.GenerateResponse.FromString(data).usage)


def _vllm_used(data: bytes) -> float | None:
    return _neo_used(vllm.GenerateResponse.FromString(data).complete)


@dataclass(frozen=True)
class Kind:
    """How one method's messages are read."""

    asked: Callable[[bytes, SharedLimits], Asked]
    used: Callable[[bytes], float | None] = lambda data: None


_INFER = Kind(_kserve)
KINDS: Mapping[str, Kind] = {
    "/neo.v1.InferenceService/Generate": Kind(_neo, _neo_unary_used),
    "/neo.v1.InferenceService/GenerateStream": Kind(_neo, _neo_stream_used),
    "/vllm.grpc.engine.VllmEngine/Generate": Kind(_vllm, _vllm_used),
    "/inference.GRPCInferenceService/ModelInfer": _INFER,
    "/inference.GRPCInferenceService/ModelStreamInfer": _INFER,
}
"""Methods that generate: admission is for these alone."""


def asked(path: str, request: bytes, metadata: Any, shared: SharedLimits) -> Asked:
    """path: one of KINDS. A message that cannot be read counts by its size; it is the backend's to
    refuse. Raises ValueError for a priority that is none."""
    try:
        found = KINDS[path].asked(request, shared)
    except DecodeError:
        found = Asked(Cost(_text_tokens(len(request), shared)))
    for key, value in metadata or ():
        if key == PRIORITY_KEY:
            return Asked(found.cost, _priority(value))
    return found


def used(path: str, request_choices: int, last: bytes) -> float | None:
    """Tokens that a call took that ended well; None: its last message does not say."""
    kind = KINDS[path]
    if kind.used is _vllm_used and request_choices > 1:
        return None  # each choice's last message counts that choice alone
    try:
        return kind.used(last)
    except DecodeError:
        return None


def _priority(value: Any) -> int:
    try:
        number = int(value)
    except ValueError:
        number = MAX_PRIORITY + 1
    if abs(number) > MAX_PRIORITY:
        raise ValueError(f"{PRIORITY_KEY} must be a whole number of -100 to 100")
    return number
