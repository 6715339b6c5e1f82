"""POST /v1/completions: its body, and how its answers are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from neo_http.answers import logprob, token_text
from neo_http.body import NEUTRAL, U32, Body, read
from neo_http.errors import invalid
from neo_http.question import Asked, Piece, Question, Texts, base_request, common, identity_of
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import types_pb2 as types

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
MAX_PROMPTS = 128
MAX_CHOICES = 256
"""Choices of all prompts together."""


class CompletionBody(Body, kw_only=True):
    prompt: str | list[str | int | list[U32]] | None = None
    logprobs: U32 | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    suffix: Any = None
    prompt_embeds: Any = None


_NEUTRAL = {**NEUTRAL, "suffix": ("",), "prompt_embeds": ([],)}


def read_completion(data: bytes) -> Question:
    """Raises ServiceError."""
    # OpenAI demands best_of >= n; equal to n, it changes nothing.
    body = read(data, CompletionBody, {k: v for k, v in _NEUTRAL.items() if k != "best_of"})
    if body.best_of not in (None, 1 if body.n is None else body.n):
        raise invalid("best_of", "is not supported here, unless it equals n")
    base = base_request(body)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    echo, hide = bool(body.echo), max_tokens == 0
    if hide and not echo:
        raise invalid("max_tokens", "must be at least 1, without echo")
    base.sampling.max_tokens = max(1, max_tokens)
    base.skip_special_tokens_in_prompt = body.add_special_tokens is False
    if body.logprobs is not None:
        base.sampling.logprobs = body.logprobs
        if echo:
            base.sampling.prompt_logprobs = max(body.logprobs, body.prompt_logprobs or 0)
    identity = identity_of(body, "cmpl-")
    asked = []
    prompts = _prompts(body.prompt)
    if len(prompts) * max(1, base.sampling.n) > MAX_CHOICES:
        raise invalid("prompt", f"and n ask for more than {MAX_CHOICES} choices")
    for number, prompt in enumerate(prompts):
        request = pb.GenerateRequest()
        request.CopyFrom(base)
        request.request_id = identity if len(prompts) == 1 else f"{identity}-{number}"
        asked.append(_asked(request, prompt, echo))
    return Question(
        identity,
        SHAPE,
        asked,
        logprobs=body.logprobs is not None,
        echo=echo,
        hide_output=hide,
        **common(body),
    )


def _asked(request: pb.GenerateRequest, prompt: str | Sequence[int], echo: bool) -> Asked:
    if isinstance(prompt, str):
        request.text = prompt
        return Asked(request, prompt_text=prompt if echo else "")
    request.token_ids.ids.extend(prompt)
    return Asked(request, prompt_ids=prompt)


def _prompts(prompt: str | list[str | int | list[int]] | None) -> Sequence[str | Sequence[int]]:
    """One prompt or several, each a text or token ids."""
    if prompt is None:
        raise invalid("prompt", "is missing")
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        raise invalid("prompt", "must be a text, token ids, or a list of either; not empty")
    if kinds == {int}:
        ids = cast(list[int], prompt)
        if not 0 <= min(ids) <= max(ids) < 2**32:
            raise invalid("prompt", "holds numbers that are no token ids")
        return [ids]
    if len(prompt) > MAX_PROMPTS:
        raise invalid("prompt", f"holds {len(prompt)} prompts; at most {MAX_PROMPTS} are taken")
    return cast(Sequence[str | Sequence[int]], prompt)


class CompletionShape:
    whole = "text_completion"
    chunk = "text_completion"
    prompt_in_choices = True

    def choice(self, piece: Piece, texts: Texts, question: Question) -> dict[str, Any]:
        said: dict[str, Any] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": _logprobs(piece, texts, question) if question.logprobs else None,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
        }
        if question.return_token_ids:
            said["token_ids"] = list(piece.token_ids)
        return said

    def delta(self, piece: Piece, texts: Texts, question: Question, first: bool) -> dict[str, Any]:
        return self.choice(piece, texts, question)


SHAPE = CompletionShape()


def _logprobs(piece: Piece, texts: Texts, question: Question) -> dict[str, Any]:
    tokens, values, tops, offsets = [], [], [], []
    at = question.offsets.get(piece.index, 0)
    for entry in piece.entries:
        text = token_text(entry.token_id, texts, question)
        tokens.append(text)
        values.append(logprob(entry.logprob) if entry.rank else None)
        tops.append(_top(entry, texts, question) if entry.rank else None)
        offsets.append(at)
        at += len(text)
    question.offsets[piece.index] = at
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _top(entry: types.TokenLogprobs, texts: Texts, question: Question) -> dict[str, float]:
    """Different tokens may look the same; the most likely of them stands."""
    found: dict[str, float] = {}
    for token, value in (
        *((top.token_id, top.logprob) for top in entry.top),
        (entry.token_id, entry.logprob),
    ):
        found.setdefault(token_text(token, texts, question), logprob(value))
    return found
