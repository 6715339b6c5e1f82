"""POST /v1/chat/completions: its body, and how its answers are written."""

from __future__ import annotations

from typing import Any

import msgspec

from neo_http.answers import logprob, token_text
from neo_http.body import NEUTRAL, U32, Body, check_supported, read
from neo_http.errors import invalid
from neo_http.question import Asked, Piece, Question, Texts, base_request, common, identity_of
from protos.neo.v1 import types_pb2 as types

ROLES = {"developer": "system"}
"""Roles that models' templates do not know, and what they mean to them."""


class Part(msgspec.Struct, kw_only=True):
    """Of a message; only text is understood."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    role: str
    content: str | list[Part] | None = None

    name: Any = None
    refusal: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    annotations: Any = None


_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "name": ("",),
    "refusal": (),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "annotations": ([],),
}


class ChatBody(Body, kw_only=True):
    messages: list[Message]
    max_completion_tokens: U32 | None = None
    logprobs: bool | None = None
    top_logprobs: U32 | None = None

    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    echo: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    add_special_tokens: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    documents: Any = None
    mm_processor_kwargs: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
}


def read_chat(data: bytes) -> Question:
    """Raises ServiceError."""
    body = read(data, ChatBody, _NEUTRAL)
    request = base_request(body)
    if not body.messages:
        raise invalid("messages", "is empty")
    request.chat.messages.extend(
        _message(number, message) for number, message in enumerate(body.messages)
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if limit is not None:
        request.sampling.max_tokens = limit
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    if body.logprobs:
        request.sampling.logprobs = body.top_logprobs or 0
    request.request_id = identity = identity_of(body, "chatcmpl-")
    return Question(identity, SHAPE, [Asked(request)], logprobs=bool(body.logprobs), **common(body))


def _message(number: int, message: Message) -> types.ChatMessage:
    field = f"messages[{number}]"
    check_supported(message, _MESSAGE_NEUTRAL, f"{field}.")
    if message.role in ("tool", "function"):
        raise invalid(f"{field}.role", f"{message.role} is not supported here")
    if message.content is None:
        raise invalid(f"{field}.content", "is missing")
    if isinstance(message.content, str):
        content = message.content
    else:
        content = "\n".join(_text(f"{field}.content", part) for part in message.content)
    return types.ChatMessage(role=ROLES.get(message.role, message.role), content=content)


def _text(field: str, part: Part) -> str:
    if part.type != "text":
        raise invalid(field, f"holds a part of type {part.type[:40]!r}; only text is served here")
    if part.text is None:
        raise invalid(field, "holds a part without text")
    return part.text


class ChatShape:
    whole = "chat.completion"
    chunk = "chat.completion.chunk"
    prompt_in_choices = False

    def choice(self, piece: Piece, texts: Texts, question: Question) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._said("message", message, piece, texts, question)

    def delta(self, piece: Piece, texts: Texts, question: Question, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if piece.text or first:
            delta["content"] = piece.text
        return self._said("delta", delta, piece, texts, question)

    def _said(
        self, name: str, what: dict[str, Any], piece: Piece, texts: Texts, question: Question
    ) -> dict[str, Any]:
        said: dict[str, Any] = {
            "index": piece.index,
            name: what,
            "logprobs": _logprobs(piece, texts, question) if question.logprobs else None,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
        }
        if question.return_token_ids:
            said["token_ids"] = list(piece.token_ids)
        return said


SHAPE = ChatShape()


def _logprobs(piece: Piece, texts: Texts, question: Question) -> dict[str, Any]:
    def one(token: int, value: float) -> dict[str, Any]:
        return {
            "token": token_text(token, texts, question),
            "logprob": logprob(value),
            "bytes": list(texts[token]),
        }

    content = [
        {
            **one(entry.token_id, entry.logprob),
            "top_logprobs": [one(top.token_id, top.logprob) for top in entry.top],
        }
        for entry in piece.entries
    ]
    return {"content": content, "refusal": None}
