"""A body's fields as neo.v1's sampling and scheduling. Raises ServiceError naming the field; ranges
that the backend checks are left to it."""

from __future__ import annotations

import msgspec

from neo_http.body import Body, ResponseFormat, StructuredOutputs
from neo_http.errors import invalid
from protos.neo.v1 import types_pb2 as types

SAME = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_tokens", "n",
)  # fmt: skip
"""Fields that mean in neo.v1 what they mean here."""
MAX_PRIORITY = 100
_PLACEMENTS = {
    "auto": types.PLACEMENT_AUTO,
    "gpu-only": types.PLACEMENT_GPU_ONLY,
    "cpu-preferred": types.PLACEMENT_CPU_PREFERRED,
}


def sampling(body: Body) -> types.SamplingParams:
    """All but max_tokens and logprobs, which the two ways to generate name differently."""
    params = types.SamplingParams(ignore_eos=bool(body.ignore_eos))
    for name in SAME:
        if (value := getattr(body, name)) is not None:
            setattr(params, name, value)
    if body.top_k is not None:
        params.top_k = _top_k(body.top_k)
    if body.seed is not None:
        params.seed = _seed(body.seed)
    if body.prompt_logprobs is not None:
        params.prompt_logprobs = body.prompt_logprobs
    params.stop_token_ids.extend(body.stop_token_ids or ())
    params.stop.extend([body.stop] if isinstance(body.stop, str) else body.stop or ())
    for token, bias in (body.logit_bias or {}).items():
        params.logit_bias[_token(token)] = bias
    structured = _structured(body)
    if structured is not None:
        params.structured.CopyFrom(structured)
    return params


def scheduling(body: Body) -> types.SchedulingParams:
    params = types.SchedulingParams()
    if body.placement is not None:
        params.placement = _PLACEMENTS[body.placement.replace("_", "-")]
    if body.priority is not None:
        if abs(body.priority) > MAX_PRIORITY:
            raise invalid("priority", f"must be -{MAX_PRIORITY} to {MAX_PRIORITY}")
        params.priority = -body.priority  # in vLLM the smaller is served earlier
    if body.cache_salt is not None:
        params.cache_salt = body.cache_salt
    if body.ttft_ms is not None:
        params.ttft_ms = body.ttft_ms
    if body.tpot_ms is not None:
        params.tpot_ms = body.tpot_ms
    return params


def _top_k(value: int) -> int:
    if not -1 <= value < 2**32:
        raise invalid("top_k", "must be at least 1, or -1 or 0 for all")
    return max(value, 0)


def _seed(value: int) -> int:
    if not -(2**63) <= value < 2**64:
        raise invalid("seed", "must have at most 64 bits")
    return value % 2**64


def _token(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 2**32):
        raise invalid("logit_bias", "must have token ids as its keys")
    return int(text)


def _structured(body: Body) -> types.StructuredOutput | None:
    found = [
        each
        for each in (
            _of_format(body.response_format),
            _of_vllm("structured_outputs", body.structured_outputs),
            _of_vllm(
                "guided_json, guided_regex, guided_choice, guided_grammar",
                StructuredOutputs(
                    json=body.guided_json,
                    regex=body.guided_regex,
                    choice=body.guided_choice,
                    grammar=body.guided_grammar,
                ),
            ),
        )
        if each is not None
    ]
    if len(found) > 1:
        raise invalid(
            "response_format", "and other fields say twice what the output must be; give one"
        )
    return found[0] if found else None


def _of_format(wanted: ResponseFormat | None) -> types.StructuredOutput | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return types.StructuredOutput(json_object=True)
    if wanted.type != "json_schema":
        raise invalid("response_format.type", "must be text, json_object or json_schema")
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise invalid("response_format.json_schema", "must hold a schema")
    schema = _json("response_format.json_schema", wanted.json_schema.schema)
    return types.StructuredOutput(json_schema=schema)


def _of_vllm(field: str, wanted: StructuredOutputs | None) -> types.StructuredOutput | None:
    if wanted is None:
        return None
    given = [name for name in wanted.__struct_fields__ if getattr(wanted, name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise invalid(field, f"must say one thing, not {', '.join(given)}")
    if wanted.json is not None:
        schema = wanted.json if isinstance(wanted.json, str) else _json(field, wanted.json)
        return types.StructuredOutput(json_schema=schema)
    if wanted.choice is not None:
        return types.StructuredOutput(choices=types.ChoiceList(texts=wanted.choice))
    if wanted.regex is not None:
        return types.StructuredOutput(regex=wanted.regex)
    if wanted.grammar is not None:
        return types.StructuredOutput(grammar=wanted.grammar)
    return types.StructuredOutput(json_object=True) if wanted.json_object else None


def _json(field: str, value: object) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError:
        raise invalid(field, "is nested too deeply") from None
