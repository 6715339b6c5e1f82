"""Parts of an answer that both ways to generate share, as values for JSON. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neo_http.question import Question, Texts
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import types_pb2 as types

FINISH = {
    types.FINISH_REASON_UNSPECIFIED: None,
    types.FINISH_REASON_STOP: "stop",
    types.FINISH_REASON_LENGTH: "length",
    types.FINISH_REASON_ABORTED: "abort",
}
LOWEST = -9999.0
"""JSON has no infinity; vLLM says this for an impossible token."""
_SUMMED = (
    "prompt_tokens", "completion_tokens", "gpu_tokens", "host_tokens", "demotions", "promotions",
    "recomputations", "cached_prompt_tokens", "cached_host_tokens", "prefix_hit_tokens",
)  # fmt: skip


def total(usages: Sequence[types.Usage]) -> types.Usage:
    """Of a batch: counts are summed, of times the longest counts."""
    whole = types.Usage()
    for name in _SUMMED:
        setattr(whole, name, sum(getattr(usage, name) for usage in usages))
    for name in ("queue_seconds", "ttft_seconds"):
        setattr(whole, name, max((getattr(usage, name) for usage in usages), default=0.0))
    return whole


def usage_json(usage: types.Usage, *, hide_output: bool = False) -> dict[str, Any]:
    """`neo`: what the engine says beyond OpenAI's counts."""
    completion = 0 if hide_output else usage.completion_tokens
    return {
        **counts_json(usage.prompt_tokens, completion),
        "prompt_tokens_details": {"cached_tokens": usage.prefix_hit_tokens},
        "neo": {
            "gpu_tokens": usage.gpu_tokens,
            "host_tokens": usage.host_tokens,
            "demotions": usage.demotions,
            "promotions": usage.promotions,
            "recomputations": usage.recomputations,
            "cached_host_tokens": usage.cached_host_tokens,
            "queue_seconds": usage.queue_seconds,
            "ttft_seconds": usage.ttft_seconds,
        },
    }


def counts_json(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def stop_reason(choice: pb.Choice) -> str | int | None:
    stopped_by = choice.WhichOneof("stopped_by")
    return None if stopped_by is None else getattr(choice, stopped_by)


def token_text(token: int, texts: Texts, question: Question) -> str:
    if question.ids_as_tokens:
        return f"token_id:{token}"
    return texts[token].decode(errors="replace")


def logprob(value: float) -> float:
    return max(value, LOWEST)


def prompt_logprobs_json(
    entries: Sequence[types.TokenLogprobs], texts: Texts, question: Question
) -> list[dict[str, Any] | None]:
    """As vLLM has them: the most likely tokens at each place, and the one that is there."""

    def one(token: int, value: float, rank: int) -> dict[str, Any]:
        return {
            "logprob": logprob(value),
            "rank": rank,
            "decoded_token": token_text(token, texts, question),
        }

    found: list[dict[str, Any] | None] = [None]
    for entry in entries:
        at = {
            str(top.token_id): one(top.token_id, top.logprob, rank)
            for rank, top in enumerate(entry.top, start=1)
        }
        at[str(entry.token_id)] = one(entry.token_id, entry.logprob, entry.rank)
        found.append(at)
    return found
