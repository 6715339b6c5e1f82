"""What a body asked, understood: calls of neo.v1 to make, and how to say what they answer."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from neo_http.body import Body
from neo_http.errors import invalid
from neo_http.sampling import sampling, scheduling
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import types_pb2 as types

MAX_ID_CHARACTERS = 100
MAX_SECONDS = 7 * 86400.0
"""Longer time-outs are as good as none, and gRPC's clock has an end."""

Texts = Mapping[int, bytes]
"""Token id -> what it adds to a text."""


@dataclass
class Asked:
    """One prompt's call."""

    request: pb.GenerateRequest
    prompt_text: str = ""
    """With `echo`; else empty."""
    prompt_ids: Sequence[int] = ()
    """Where they are known or `Question.needs_prompt_ids`."""


@dataclass(frozen=True)
class Piece:
    """What is said of one choice: all of it, or what is new in a stream."""

    index: int
    text: str
    entries: Sequence[types.TokenLogprobs] = ()
    """Empty unless log probabilities were asked for; rank 0 marks a token that has none."""
    token_ids: Sequence[int] = ()
    finish: str | None = None
    stop_reason: str | int | None = None
    """What stopped it, where that is not the model's end-of-sequence token."""


class Shape(Protocol):
    """How one way to generate writes its answers."""

    whole: str
    """`object` of an answer."""
    chunk: str
    """`object` of a piece in a stream."""
    prompt_in_choices: bool
    """Where what is said of the prompt goes: into each choice, or beside them, as in vLLM."""

    def choice(self, piece: Piece, texts: Texts, question: Question) -> dict[str, Any]: ...

    def delta(
        self, piece: Piece, texts: Texts, question: Question, first: bool
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Question:
    """One HTTP request to generate."""

    identity: str
    shape: Shape
    asked: list[Asked]
    """One call for each prompt; choice j of prompt i is choice i * n + j of the answer."""
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    """Usage so far in each chunk, as vLLM has it."""
    logprobs: bool = False
    prompt_logprobs: bool = False
    echo: bool = False
    hide_output: bool = False
    """max_tokens is 0: one token is generated, since neo.v1 knows no less, and not shown."""
    return_token_ids: bool = False
    ids_as_tokens: bool = False
    """Tokens are written `token_id:123`."""
    timeout_seconds: float | None = None
    session: str = ""
    """Of what other requests this one goes on, as its client says; "" if it does not."""
    offsets: dict[int, int] = field(default_factory=dict)
    """Choice -> characters said so far, for `text_offset`."""

    @property
    def n(self) -> int:
        return max(1, self.asked[0].request.sampling.n)

    @property
    def needs_prompt_ids(self) -> bool:
        return (
            (self.echo and self.logprobs)
            or self.return_token_ids
            or self.continuous_usage
            or self.prompt_logprobs
        )

    @property
    def model(self) -> str:
        """As asked for; "" is the default one."""
        return self.asked[0].request.model


def identity_of(body: Body, prefix: str) -> str:
    """Also the neo.v1 request id, so that operators can abort what clients report."""
    if body.request_id is None:
        return prefix + uuid.uuid4().hex
    given = body.request_id
    if not (1 <= len(given) <= MAX_ID_CHARACTERS and given.isascii() and given.isprintable()):
        raise invalid("request_id", f"must be 1 to {MAX_ID_CHARACTERS} printable ASCII characters")
    return prefix + given  # it is a header of the answer, too


def base_request(body: Body) -> pb.GenerateRequest:
    """All but the prompt, max_tokens and logprobs."""
    return pb.GenerateRequest(
        model=body.model or "",
        sampling=sampling(body),
        scheduling=scheduling(body),
        include_special_tokens=body.skip_special_tokens is False,
    )


def common(body: Body) -> dict[str, Any]:
    """What both ways to generate put into a Question alike."""
    options = body.stream_options
    timeout = body.timeout_ms
    if timeout is not None and not timeout > 0:
        raise invalid("timeout_ms", "must be more than 0")
    return {
        "stream": bool(body.stream),
        "include_usage": options is not None and bool(options.include_usage),
        "continuous_usage": options is not None and bool(options.continuous_usage_stats),
        "prompt_logprobs": body.prompt_logprobs is not None,
        "return_token_ids": bool(body.return_token_ids),
        "ids_as_tokens": bool(body.return_tokens_as_token_ids),
        "session": body.prompt_cache_key or "",
        "timeout_seconds": None if timeout is None else min(timeout / 1000, MAX_SECONDS),
    }
