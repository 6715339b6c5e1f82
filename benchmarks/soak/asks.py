"""What is asked: a finite set of requests whose answers are known, and ways to ask them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from benchmarks.soak.model import CONTEXT_TOKENS, VOCABULARY
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

PLACEMENTS = (
    types.PLACEMENT_AUTO,
    types.PLACEMENT_GPU_ONLY,
    types.PLACEMENT_CPU_PREFERRED,
    types.PLACEMENT_CPU_PREFERRED,
)
SYSTEM_TOKENS = 64
"""What half of the prompts begin with."""


@dataclass(frozen=True)
class Question:
    """A request whose tokens depend on nothing but itself."""

    number: int
    prompt: tuple[int, ...]
    sampling: types.SamplingParams

    def request(self, placement: types.Placement) -> inference.GenerateRequest:
        return inference.GenerateRequest(
            token_ids=types.TokenIds(ids=self.prompt),
            sampling=self.sampling,
            scheduling=types.SchedulingParams(placement=placement),
            token_ids_only=self.number % 3 > 0,
        )


Answer = tuple[tuple[int, ...], ...]
"""Token ids of each choice."""


class Manner(Enum):
    """How a request is sent, and what its end must be."""

    STREAM = "stream"
    UNARY = "unary"
    CANCEL = "cancel"
    """The client goes after some tokens."""
    DEADLINE = "deadline"
    """So short that it passes, mostly."""
    REFUSED = "refused"
    """Wrong in one field."""


SHARES = {
    Manner.STREAM: 0.66,
    Manner.UNARY: 0.12,
    Manner.CANCEL: 0.12,
    Manner.DEADLINE: 0.05,
    Manner.REFUSED: 0.05,
}


@dataclass(frozen=True)
class Ask:
    """One request on its way. question: None for one to be refused, whose reason is `reason`."""

    manner: Manner
    request: inference.GenerateRequest
    question: Question | None
    seconds: float
    """Deadline."""
    cancel_after: int = 0
    """Tokens."""
    reason: str = ""


def questions(count: int, seed: int) -> list[Question]:
    draw = random.Random(seed)
    system = [draw.randrange(3, VOCABULARY) for _ in range(SYSTEM_TOKENS)]
    made = []
    for number in range(count):
        length = draw.choice([1, 7, 16, 33, 90, 200, 400])
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        if number % 2:
            prompt = system + prompt
        made.append(Question(number, tuple(prompt), _sampling(draw, number)))
    return made


def _sampling(draw: random.Random, number: int) -> types.SamplingParams:
    """Greedy for half of them; the others draw by a seed of theirs, in several ways."""
    sampling = types.SamplingParams(
        temperature=0, max_tokens=draw.choice([1, 2, 15, 16, 17, 40, 80]), ignore_eos=True
    )
    if number % 4 in (1, 2):
        sampling.temperature = draw.choice([0.7, 1.0, 1.3])
        sampling.seed = draw.randrange(1 << 63)
        kind = draw.randrange(5)
        if kind == 1:
            sampling.top_p = 0.9
        elif kind == 2:
            sampling.top_k = 20
        elif kind == 3:
            sampling.repetition_penalty = 1.2
        elif kind == 4:
            sampling.n = 2
    return sampling


class Asker:
    """Draws asks without end, the same for the same seed."""

    def __init__(self, known: Sequence[Question], seed: int) -> None:
        self._known = known
        self._draw = random.Random(seed)

    def next(self) -> Ask:
        draw = self._draw
        manner = draw.choices(list(SHARES), list(SHARES.values()))[0]
        if manner is Manner.REFUSED:
            return self._wrong()
        question = draw.choice(self._known)
        request = question.request(draw.choice(PLACEMENTS))
        request.scheduling.priority = draw.choice([0, 0, 0, 5, -5])
        seconds, after = 120.0, 0
        if manner is Manner.DEADLINE:
            seconds = draw.choice([0.005, 0.02, 0.1, 0.3])
        if manner is Manner.CANCEL:
            after = draw.randrange(0, question.sampling.max_tokens + 1)
        return Ask(manner, request, question, seconds, after)

    def _wrong(self) -> Ask:
        request = self._draw.choice(self._known).request(types.PLACEMENT_AUTO)
        kind = self._draw.randrange(4)
        reason = "INVALID_ARGUMENT"
        if kind == 0:
            request.sampling.temperature = -1.0
        elif kind == 1:
            request.ClearField("token_ids")
        elif kind == 2:
            request.model, reason = "nobody-serves-this", "UNKNOWN_MODEL"
        else:
            request.token_ids.ids[:] = [5] * (CONTEXT_TOKENS + 1)
        return Ask(Manner.REFUSED, request, None, 120.0, reason=reason)
