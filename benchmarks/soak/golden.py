"""Answers of an engine without faults, one request at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.soak.asks import Answer, Question
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

MARGIN = 1e-3
"""Smallest difference of log probabilities between a greedy token and the next best: sums in
another order differ by some 1e-6 in float32, and nobody promises which of two equals wins."""


async def known_answers(stub: Any, asked: Sequence[Question]) -> dict[int, Answer]:
    """By number; without those whose greedy answer hangs by less than MARGIN."""
    found = {}
    for question in asked:
        request = question.request(types.PLACEMENT_GPU_ONLY)
        request.token_ids_only = True
        request.sampling.logprobs = 2
        answer = await stub.Generate(request, timeout=120)
        if question.sampling.temperature or _margin(answer) > MARGIN:
            choices = sorted(answer.choices, key=lambda choice: choice.index)
            found[question.number] = tuple(tuple(choice.token_ids) for choice in choices)
    return found


def _margin(answer: inference.GenerateResponse) -> float:
    return min(
        token.top[0].logprob - token.top[1].logprob
        for choice in answer.choices
        for token in choice.logprobs
    )
