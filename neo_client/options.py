"""What a caller says about a request; shared by both clients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text; token ids; or chat messages, each `{"role": ..., "content": ...}`."""

PLACEMENTS = {
    "auto": types.PLACEMENT_AUTO,
    "gpu-only": types.PLACEMENT_GPU_ONLY,
    "cpu-preferred": types.PLACEMENT_CPU_PREFERRED,
}


@dataclass(frozen=True)
class Structured:
    """What each choice's text must be; exactly one field. See neo.v1.StructuredOutput."""

    json_schema: str | Mapping[str, Any] | None = None
    """A JSON Schema, as text or as what `json.loads` makes of it."""
    regex: str | None = None
    grammar: str | None = None
    """Lark or GBNF."""
    json_object: bool = False
    choices: Sequence[str] = ()

    def to_proto(self) -> types.StructuredOutput:
        """Raises ValueError unless exactly one field is set."""
        given = [each.name for each in fields(self) if getattr(self, each.name)]
        if len(given) != 1:
            raise ValueError("structured must set exactly one of its fields")
        if self.choices:
            return types.StructuredOutput(choices=types.ChoiceList(texts=self.choices))
        schema = self.json_schema
        return types.StructuredOutput(
            json_schema=schema if schema is None or isinstance(schema, str) else json.dumps(schema),
            regex=self.regex,
            grammar=self.grammar,
            json_object=self.json_object or None,
        )


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; fields, ranges and defaults are those of neo.v1.SamplingParams. None
    takes the server's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: Structured | None = None

    def to_proto(self) -> types.SamplingParams:
        """Raises ValueError, naming the field, for what the message cannot even hold."""
        message = types.SamplingParams()
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None:
                continue
            try:
                if isinstance(value, Structured):
                    message.structured.CopyFrom(value.to_proto())
                elif isinstance(value, Mapping):
                    getattr(message, each.name).update(value)
                elif isinstance(value, Sequence) and not isinstance(value, str):
                    getattr(message, each.name).extend(value)
                else:
                    setattr(message, each.name, value)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{each.name} cannot be {value!r}: {error}") from None
        return message


@dataclass(frozen=True)
class Scheduling:
    """What is asked of the scheduler; see neo.v1.SchedulingParams."""

    placement: str | None = None
    """`auto`, `gpu-only` or `cpu-preferred`; None takes the server's default."""
    priority: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    cache_salt: str = ""

    def to_proto(self) -> types.SchedulingParams:
        if self.placement is not None and self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}")
        return types.SchedulingParams(
            placement=PLACEMENTS[self.placement] if self.placement else None,
            priority=self.priority,
            ttft_ms=self.ttft_ms,
            tpot_ms=self.tpot_ms,
            cache_salt=self.cache_salt,
        )


def is_chat(prompt: Prompt) -> TypeGuard[Sequence[Mapping[str, str]]]:
    """Whether it is chat messages. Raises ValueError for an empty one, and for a mixture."""
    if not prompt:
        raise ValueError("prompt must not be empty")
    kinds = {isinstance(part, Mapping) for part in prompt}
    if len(kinds) > 1:
        raise ValueError("prompt must be text, token ids or chat messages, not a mixture")
    return True in kinds


def chat_of(messages: Sequence[Mapping[str, str]]) -> types.Chat:
    """Raises ValueError for a message without `role` or `content`."""
    chat = types.Chat()
    for number, message in enumerate(messages):
        if set(message) != {"role", "content"}:
            raise ValueError(f"chat message {number} must have exactly the keys role and content")
        chat.messages.add(role=message["role"], content=message["content"])
    return chat


def generate_request(
    prompt: Prompt,
    *,
    model: str = "",
    request_id: str = "",
    sampling: Sampling | None = None,
    scheduling: Scheduling | None = None,
    include_special_tokens: bool = False,
    token_ids_only: bool = False,
) -> inference.GenerateRequest:
    """The message for `prompt`. Raises ValueError naming the field; the server checks the rest."""
    request = inference.GenerateRequest(
        request_id=request_id,
        model=model,
        sampling=sampling.to_proto() if sampling else None,
        scheduling=scheduling.to_proto() if scheduling else None,
        include_special_tokens=include_special_tokens,
        token_ids_only=token_ids_only,
    )
    if isinstance(prompt, str):
        request.text = prompt
    elif is_chat(prompt):
        request.chat.CopyFrom(chat_of(prompt))
    else:
        try:
            request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            raise ValueError(f"prompt must be token ids of 32 bits: {error}") from None
    return request
