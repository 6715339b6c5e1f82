"""What a JSON body may hold, beside what is asked: fields of both ways to generate.

Types are checked by msgspec as the body is read. A field that is not known is an error, and so is
one that would change the answer and cannot be honoured: clients hear of it instead of wondering.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from neo_common.errors import Reason, ServiceError
from neo_http.errors import invalid

U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_Body = TypeVar("_Body", bound="Body")
MAX_ECHOED = 300
"""Characters of a complaint about JSON: it names fields, which are the client's to choose."""


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's; at most one is given."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """None: not given."""

    # OpenAI's
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: U32 | None = None
    max_tokens: U32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    response_format: ResponseFormat | None = None
    prompt_cache_key: str | None = None
    # OpenAI's that change nothing here: who asks, for their own books.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None

    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: U32 | None = None
    stop_token_ids: list[U32] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: U32 | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    # Ours
    placement: Literal["auto", "gpu-only", "gpu_only", "cpu-preferred", "cpu_preferred"] | None = (
        None
    )
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    timeout_ms: float | None = None

    # Known, and refused unless they say what is done anyway; see `NEUTRAL`.
    best_of: Any = None
    store: Any = None
    service_tier: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    include_stop_str_in_output: Any = None
    spaces_between_special_tokens: Any = None
    truncate_prompt_tokens: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logits_processors: Any = None
    kv_transfer_params: Any = None
    vllm_xargs: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
}


def read(data: bytes, kind: type[_Body], neutral: dict[str, tuple[Any, ...]]) -> _Body:
    """A checked body. neutral: what fields of `kind` may say that cannot be honoured otherwise.
    Raises ServiceError."""
    try:
        body = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _complaint(str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ServiceError(
            Reason.INVALID_ARGUMENT, f"the body is not JSON: {str(error)[:MAX_ECHOED]}"
        ) from None
    check_supported(body, neutral)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "needs stream to be true")
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "cannot be streamed")
    return body


def check_supported(
    given: msgspec.Struct, neutral: dict[str, tuple[Any, ...]], where: str = ""
) -> None:
    """Raises ServiceError for a field of `neutral` that says something else."""
    for name, harmless in neutral.items():
        value = getattr(given, name)
        # 1 == True, so types are compared, too.
        if value is not None and not any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in harmless
        ):
            raise invalid(where + name, "is not supported here")


def _complaint(message: str) -> ServiceError:
    """msgspec says "Expected `int`, got `str` - at `$.stop[0]`"; the path is our field."""
    what, _, where = message.partition(" - at ")
    found = re.match(r"`\$\.?(.*)`$", where)
    unknown = re.search(r"unknown field `(.*)`", what)
    names = [name for name in (found and found[1], unknown and unknown[1]) if name]
    if not names:
        return ServiceError(Reason.INVALID_ARGUMENT, f"the body: {what[:MAX_ECHOED]}")
    field = ".".join(names)[:MAX_ECHOED]
    if unknown:
        return ServiceError(Reason.INVALID_ARGUMENT, f"{field} is not a known field", field=field)
    return ServiceError(Reason.INVALID_ARGUMENT, f"{field}: {what[:MAX_ECHOED]}", field=field)
