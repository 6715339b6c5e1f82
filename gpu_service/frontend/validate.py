"""A client's request, checked field by field, as a command for the engine core."""

from __future__ import annotations

import asyncio
import math
import secrets
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gpu_service.engine.messages import SamplingSpec, Submit
from gpu_service.model.tokenizer import Tokenizer
from neo_common.errors import Reason, ServiceError
from neo_common.grpc import principal
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

MAX_REQUEST_ID_CHARACTERS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_SALT_CHARACTERS = 128
REPETITION_PENALTY = (0.001, 1000)
"""Logits divided by less may be infinite, and the request ends with what looks like our fault."""
# Tokenising this much takes about a millisecond; more goes to a thread, off the event loop.
INLINE_CHARACTERS = 2000
# Normalisers may shorten a text before it is cut into tokens; composing Hangul, to a third.
MAX_SHORTENING = 4

_TARGETS: tuple[Literal["ttft_ms", "tpot_ms"], ...] = ("ttft_ms", "tpot_ms")
_PLACEMENTS = {
    types.PLACEMENT_UNSPECIFIED: "auto",
    types.PLACEMENT_AUTO: "auto",
    types.PLACEMENT_GPU_ONLY: "gpu_only",
    types.PLACEMENT_CPU_PREFERRED: "cpu_preferred",
}


@dataclass(frozen=True)
class ServedModel:
    """What requests are checked against."""

    name: str
    vocab_size: int
    max_context_tokens: int
    """Prompt plus output that this deployment serves."""


@dataclass(frozen=True)
class ParsedRequest:
    """A valid request: the engine's part, and what stays with the front end."""

    submit: Submit
    stop: tuple[str, ...]
    """Stop strings; found in the text, so not the engine's business."""
    detokenize: bool
    skip_special_tokens: bool


def invalid(field: str, problem: str) -> ServiceError:
    return ServiceError(Reason.INVALID_ARGUMENT, f"{field} {problem}", field=field)


def check_model(name: str, model: ServedModel) -> None:
    """ "" is the default model. Raises ServiceError."""
    if name not in ("", model.name):
        raise ServiceError(
            Reason.UNKNOWN_MODEL,
            f"model {name!r} is not served here ({model.name} is)",
            field="model",
        )


async def parse_request(
    request: inference.GenerateRequest,
    model: ServedModel,
    tokenizer: Tokenizer,
    *,
    now: float,
    seconds_left: float | None,
    grammar: str = "",
) -> ParsedRequest:
    """Raises ServiceError (INVALID_ARGUMENT) naming the field.

    now: time.monotonic(). seconds_left: until the client's deadline. grammar: see
    `gpu_service.frontend.structured`."""
    check_model(request.model, model)
    if len(request.request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise invalid("request_id", f"has more than {MAX_REQUEST_ID_CHARACTERS} characters")
    stop = _stop_strings(request)
    prompt = await _prompt(request, model, tokenizer)
    room = model.max_context_tokens - len(prompt)
    if room < 1:
        raise invalid(
            request.WhichOneof("prompt") or "prompt",
            f"has {len(prompt)} tokens; at most {model.max_context_tokens - 1} can be served",
        )
    sampling = sampling_spec(request.sampling, model, room, grammar)
    submit = Submit(
        request_id=request.request_id or uuid.uuid4().hex,
        prompt_token_ids=prompt,
        sampling=sampling,
        arrival=now,
        deadline=None if seconds_left is None else now + seconds_left,
        **_scheduling(request.scheduling),
    )
    return ParsedRequest(
        submit, stop, not request.token_ids_only, not request.include_special_tokens
    )


async def _prompt(
    request: inference.GenerateRequest, model: ServedModel, tokenizer: Tokenizer
) -> list[int]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise invalid("prompt", "is missing: set text, token_ids or chat")
    if kind == "token_ids":
        ids = prompt_ids("token_ids", request.token_ids.ids, model)
    elif kind == "text":
        special = not request.skip_special_tokens_in_prompt
        ids = await encode_text(tokenizer, request.text, model, special=special)
    else:
        ids = await encode_chat(tokenizer, request.chat, model)
    if not ids:
        raise invalid(kind, "is empty")
    return ids


async def encode_text(
    tokenizer: Tokenizer, text: str, model: ServedModel, *, special: bool
) -> list[int]:
    if not text:
        raise invalid("text", "is empty")
    _check_length("text", len(text), tokenizer, model)
    return await _off_loop(len(text), lambda: tokenizer.encode(text, add_special_tokens=special))


async def encode_chat(tokenizer: Tokenizer, chat: types.Chat, model: ServedModel) -> list[int]:
    _check_count("chat.messages", len(chat.messages), "messages", model)
    messages = [{"role": m.role, "content": m.content} for m in chat.messages]
    if not messages:
        raise invalid("chat.messages", "is empty")
    if not all(m["role"] for m in messages):
        raise invalid("chat.messages.role", "is empty")
    roles, contents = (sum(len(m[part]) for m in messages) for part in ("role", "content"))
    _check_length("chat.messages.role", roles, tokenizer, model)
    _check_length("chat.messages.content", contents, tokenizer, model)
    try:
        return await _off_loop(roles + contents, lambda: tokenizer.render_chat(messages))
    except ValueError as error:
        raise ServiceError(Reason.INVALID_ARGUMENT, f"chat: {error}", field="chat") from error


async def _off_loop(characters: int, encode: Callable[[], list[int]]) -> list[int]:
    if characters <= INLINE_CHARACTERS:
        return encode()
    return await asyncio.to_thread(encode)


def _check_length(field: str, length: int, tokenizer: Tokenizer, model: ServedModel) -> None:
    """Refuse what cannot fit before time is spent on its tokens."""
    most = MAX_SHORTENING * tokenizer.longest_token * model.max_context_tokens
    if length > most:
        raise invalid(
            field,
            f"has {length} characters, more than the {model.max_context_tokens} tokens that can be "
            "served could stand for",
        )


def prompt_ids(field: str, ids: Sequence[int], model: ServedModel) -> list[int]:
    """A client's token ids as a list, which must not be longer than any prompt. Raises
    ServiceError."""
    _check_count(field, len(ids), "tokens", model)
    found = list(ids)
    check_token_ids(field, found, model.vocab_size)
    return found


def _check_count(field: str, count: int, what: str, model: ServedModel) -> None:
    most = model.max_context_tokens
    if count > most:
        raise invalid(field, f"has {count} {what}; at most {most} can be served")


def check_token_ids(field: str, ids: Collection[int], vocab_size: int) -> None:
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise invalid(field, f"holds {largest}, and the vocabulary has {vocab_size} tokens")


def _stop_strings(request: inference.GenerateRequest) -> tuple[str, ...]:
    if len(request.sampling.stop) > MAX_STOP_STRINGS:
        raise invalid("sampling.stop", f"has more than {MAX_STOP_STRINGS} strings")
    stop = tuple(request.sampling.stop)
    if any(not 1 <= len(text.encode()) <= MAX_STOP_BYTES for text in stop):
        raise invalid("sampling.stop", f"must hold strings of 1 to {MAX_STOP_BYTES} bytes")
    if stop and request.token_ids_only:
        raise invalid("sampling.stop", "needs text, and token_ids_only asks for none")
    return stop


def sampling_spec(
    params: types.SamplingParams, model: ServedModel, room: int, grammar: str = ""
) -> SamplingSpec:
    """Defaults filled in. room: tokens that fit behind the prompt."""

    def given(name: Any, default: Any) -> Any:
        return getattr(params, name) if params.HasField(name) else default

    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise invalid("sampling.logit_bias", f"has more than {MAX_LOGIT_BIAS} entries")
    bias = dict(params.logit_bias)
    check_token_ids("sampling.logit_bias", bias, model.vocab_size)
    for value in bias.values():
        _between("sampling.logit_bias", value, -100, 100)
    if len(params.stop_token_ids) > MAX_STOP_TOKENS:
        raise invalid("sampling.stop_token_ids", f"has more than {MAX_STOP_TOKENS} ids")
    stop_ids = tuple(params.stop_token_ids)
    check_token_ids("sampling.stop_token_ids", stop_ids, model.vocab_size)
    spec = SamplingSpec(
        temperature=given("temperature", 1.0),
        top_p=given("top_p", 1.0),
        top_k=given("top_k", 0),
        min_p=given("min_p", 0.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        presence_penalty=given("presence_penalty", 0.0),
        frequency_penalty=given("frequency_penalty", 0.0),
        seed=params.seed if params.HasField("seed") else secrets.randbits(63),
        logit_bias=bias,
        max_tokens=min(given("max_tokens", room), room),
        min_tokens=given("min_tokens", 0),
        stop_token_ids=stop_ids,
        ignore_eos=params.ignore_eos,
        n=given("n", 1),
        logprobs=given("logprobs", None),
        prompt_logprobs=given("prompt_logprobs", None),
        grammar=grammar,
    )
    _check_ranges(spec, given("max_tokens", room))
    return spec


def _check_ranges(spec: SamplingSpec, max_tokens: int) -> None:
    _between("sampling.temperature", spec.temperature, 0, math.inf)
    _between("sampling.top_p", spec.top_p, 0, 1, above=True)
    _between("sampling.min_p", spec.min_p, 0, 1)
    _between("sampling.repetition_penalty", spec.repetition_penalty, *REPETITION_PENALTY)
    _between("sampling.presence_penalty", spec.presence_penalty, -2, 2)
    _between("sampling.frequency_penalty", spec.frequency_penalty, -2, 2)
    if max_tokens < 1:
        raise invalid("sampling.max_tokens", "must be at least 1")
    if spec.min_tokens > max_tokens:
        raise invalid("sampling.min_tokens", "must not be larger than max_tokens")
    if not 1 <= spec.n <= MAX_CHOICES:
        raise invalid("sampling.n", f"must be between 1 and {MAX_CHOICES}, not {spec.n}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(spec, name) or 0) > MAX_LOGPROBS:
            raise invalid(f"sampling.{name}", f"must be at most {MAX_LOGPROBS}")


def _between(field: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """low <= value <= high, finite; `above` excludes `low`. NaN is outside of everything."""
    if math.isfinite(value) and low <= value <= high and not (above and value == low):
        return
    allowed = f"more than {low}" if above else f"at least {low}"
    bound = "" if math.isinf(high) else f" and at most {high}"
    raise invalid(field, f"must be {allowed}{bound}, not {value:g}")


def _scheduling(params: types.SchedulingParams) -> dict[str, Any]:
    if params.placement not in _PLACEMENTS:
        raise invalid("scheduling.placement", f"has no value {params.placement}")
    if not -100 <= params.priority <= 100:
        raise invalid("scheduling.priority", f"must be -100 to 100, not {params.priority}")
    targets: dict[str, float | None] = {}
    for name in _TARGETS:
        targets[name] = getattr(params, name) if params.HasField(name) else None
        if targets[name] is not None:
            _between(f"scheduling.{name}", getattr(params, name), 0, math.inf, above=True)
    if len(params.cache_salt) > MAX_SALT_CHARACTERS:
        raise invalid("scheduling.cache_salt", f"has more than {MAX_SALT_CHARACTERS} characters")
    return {
        "placement": _PLACEMENTS[params.placement],
        # No tenant's name holds a zero, so nobody can say another one's salt.
        "cache_salt": f"{principal.current().tenant}\0{params.cache_salt}",
        "priority": params.priority,
        **targets,
    }
