"""Requests of the Open Inference Protocol from and to messages of neo.v1. Pure functions.

Tensors have the names that Triton's vLLM backend gives them. A parameter of generation may come as
a tensor, in the JSON object of `sampling_parameters`, or among the request's parameters; once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_service.frontend.compat.kserve_tensors import Value, read_inputs, write_output
from gpu_service.frontend.validate import invalid
from protos.compat import kserve_pb2 as pb
from protos.neo.v1 import inference_pb2 as neo
from protos.neo.v1 import types_pb2 as types

PROMPT = "text_input"
PROMPT_IDS = "input_ids"
JSON_PARAMETERS = "sampling_parameters"
SAMPLING: Mapping[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_tokens": int,
    "min_tokens": int,
    "stop": str,
    "stop_token_ids": int,
    "ignore_eos": bool,
    "n": int,
    "logprobs": int,
}
"""Parameters that are fields of neo.v1.SamplingParams, and what each (element) is."""
LISTS = frozenset({"stop", "stop_token_ids"})
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "logprobs": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
SWITCHES = frozenset(
    {"stream", "exclude_input_in_output", *(f"return_{name}" for name in OUTPUTS)}
) - {"return_text_output"}
FINAL = "triton_final_response"
WANTS_EMPTY_FINAL = "triton_enable_empty_final_response"
DATATYPES = {float: "FP32", int: "INT32", bool: "BOOL", str: "BYTES"}

_FINISH = {
    types.FINISH_REASON_UNSPECIFIED: "",
    types.FINISH_REASON_STOP: "stop",
    types.FINISH_REASON_LENGTH: "length",
    types.FINISH_REASON_ABORTED: "abort",
}


@dataclass(frozen=True)
class Question:
    """One inference request, understood."""

    id: str
    """The client's; only handed back."""
    request: neo.GenerateRequest
    stream: bool
    prefix: str
    """What goes before the text: the prompt, unless it is to be left out."""
    outputs: tuple[str, ...]
    empty_final: bool
    """The last answer is to be one without tensors."""


def read_question(request: pb.ModelInferRequest) -> Question:
    """Raises ServiceError naming what is wrong."""
    inputs = read_inputs(request)
    given = _parameters(request, inputs)
    switches = {name: _one(name, bool, given.pop(name)) for name in SWITCHES & given.keys()}
    stream = switches.get("stream", False)
    prepend = not switches.get("exclude_input_in_output", stream)
    if prepend and stream:
        raise invalid("exclude_input_in_output", "must be true when streaming")
    outputs = _outputs(request, switches)
    asked = neo.GenerateRequest(model=request.model_name, sampling=_sampling(given))
    if {"logprobs", "cumulative_logprob"} & set(outputs) and not asked.sampling.HasField(
        "logprobs"
    ):
        asked.sampling.logprobs = 0
    prefix = _prompt(asked, inputs)
    empty_final = (
        WANTS_EMPTY_FINAL in request.parameters and request.parameters[WANTS_EMPTY_FINAL].bool_param
    )
    return Question(request.id, asked, stream, prefix if prepend else "", outputs, empty_final)


def _parameters(
    request: pb.ModelInferRequest, inputs: Mapping[str, Sequence[Value]]
) -> dict[str, Any]:
    """Name -> value or values, from all three places."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if name not in SAMPLING and name not in SWITCHES:
            raise invalid(name, "is no input or parameter of this model")
        if name in found:
            raise invalid(name, "is given twice")
        found[name] = value

    for name, values in inputs.items():
        if name == JSON_PARAMETERS:
            for inner, value in _json(values).items():
                add(inner, value)
        elif name not in (PROMPT, PROMPT_IDS):
            add(name, list(values))
    for name, parameter in request.parameters.items():
        # Those of the protocol's own are not the model's business.
        if not name.startswith("triton_"):
            kind = parameter.WhichOneof("parameter_choice")
            add(name, getattr(parameter, kind) if kind else None)
    return found


def _json(values: Sequence[Value]) -> dict[str, Any]:
    if len(values) != 1:
        raise invalid(JSON_PARAMETERS, f"has {len(values)} elements, not 1")
    try:
        parsed = json.loads(str(values[0]))
    except (ValueError, RecursionError):
        raise invalid(JSON_PARAMETERS, "is not JSON") from None
    if not isinstance(parsed, dict):
        raise invalid(JSON_PARAMETERS, "is not a JSON object")
    return parsed


def _one(name: str, kind: type, value: Any) -> Any:
    """`value`, or its only element, as `kind`. Numbers may come as text (Triton's examples)."""
    if isinstance(value, list):
        if len(value) != 1:
            raise invalid(name, f"has {len(value)} values, not 1")
        (value,) = value
    if isinstance(value, str) and kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            raise invalid(name, f"is not {_article(kind)}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**63 else value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise invalid(name, f"is not {_article(kind)}")
    return value


def _article(kind: type) -> str:
    return {float: "a number", int: "an integer", bool: "a boolean", str: "a text"}[kind]


def _sampling(given: Mapping[str, Any]) -> types.SamplingParams:
    sampling = types.SamplingParams()
    for name, value in given.items():
        kind = SAMPLING[name]
        try:
            if name in LISTS:
                several = value if isinstance(value, list) else [value]
                getattr(sampling, name).extend(_one(name, kind, one) for one in several)
                continue
            one = _one(name, kind, value)
            # vLLM's "no limit".
            setattr(sampling, name, 0 if name == "top_k" and one == -1 else one)
        except (ValueError, OverflowError):  # protobuf: too large, or negative, for its field
            raise invalid(name, "is out of range") from None
    return sampling


def _outputs(request: pb.ModelInferRequest, switches: Mapping[str, bool]) -> tuple[str, ...]:
    named = tuple(dict.fromkeys(output.name for output in request.outputs))
    for name in named:
        if name not in OUTPUTS:
            raise invalid("outputs", f"names {name!r}; there are {', '.join(OUTPUTS)}")
    if named:
        return named
    wanted = ["text_output"]
    wanted += [name for name in OUTPUTS if switches.get(f"return_{name}")]
    return tuple(wanted)


def _prompt(asked: neo.GenerateRequest, inputs: Mapping[str, Sequence[Value]]) -> str:
    """Set it; returns it as text ("" where it came as token ids)."""
    if (PROMPT in inputs) == (PROMPT_IDS in inputs):
        raise invalid(PROMPT, f"or {PROMPT_IDS} must be given, and only one of them")
    if PROMPT in inputs:
        asked.text = _one(PROMPT, str, list(inputs[PROMPT]))
        return asked.text
    try:
        asked.token_ids.ids.extend(_one(PROMPT_IDS, int, value) for value in inputs[PROMPT_IDS])
    except (ValueError, OverflowError):
        raise invalid(PROMPT_IDS, "holds a value that is no token id") from None
    return ""


@dataclass
class Answer:
    """Turns what InferenceService says of one question into the protocol's answers."""

    question: Question
    model: str
    _whole: dict[int, neo.Choice] = field(default_factory=dict)

    def take(self, message: neo.GenerateStreamResponse) -> Iterator[pb.ModelInferResponse]:
        """Streaming: one answer for each message. Otherwise one, at the end."""
        last = message.HasField("usage")
        if not self.question.stream:
            for delta in message.deltas:
                _join(self._whole.setdefault(delta.index, neo.Choice()), delta)
            choices = self._whole
        else:
            choices = {delta.index: delta for delta in message.deltas}
        if self.question.stream or last:
            empty_follows = last and self.question.empty_final
            if choices:
                yield self._answer(choices, message.usage, final=last and not empty_follows)
            if empty_follows or (last and not choices):
                yield self._bare(final=True)

    def _bare(self, *, final: bool) -> pb.ModelInferResponse:
        bare = pb.ModelInferResponse(model_name=self.model, model_version="1", id=self.question.id)
        bare.parameters[FINAL].bool_param = final
        return bare

    def _answer(
        self, choices: Mapping[int, neo.Choice], usage: types.Usage, *, final: bool
    ) -> pb.ModelInferResponse:
        """Tensors have an element for each choice; empty where there is nothing new of it."""
        answer = self._bare(final=final)
        n = max(self.question.request.sampling.n, 1)
        every = [choices.get(index, neo.Choice()) for index in range(n)]
        columns: dict[str, list[Value]] = {
            "text_output": [self.question.prefix + choice.text for choice in every],
            "finish_reason": [_FINISH[choice.finish_reason] for choice in every],
            "cumulative_logprob": [sum(e.logprob for e in choice.logprobs) for choice in every],
            "logprobs": [_logprobs(choice) for choice in every],
            "num_input_tokens": [usage.prompt_tokens],
            "num_output_tokens": [len(choice.token_ids) for choice in every],
        }
        for name in self.question.outputs:
            write_output(answer, name, OUTPUTS[name], columns[name])
        return answer


def _logprobs(choice: neo.Choice) -> str:
    """JSON as the vLLM backend writes it: for each token, an object from ids to what is known."""
    tokens = []
    for entry in choice.logprobs:
        found = {
            top.token_id: {"logprob": top.logprob, "rank": rank}
            for rank, top in enumerate(entry.top, 1)
        }
        found[entry.token_id] = {"logprob": entry.logprob, "rank": entry.rank}
        tokens.append(found)
    return json.dumps(tokens)


def _join(choice: neo.Choice, delta: neo.Choice) -> None:
    text = choice.text + delta.text
    choice.MergeFrom(delta)
    choice.text = text
