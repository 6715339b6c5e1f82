"""How much of their prompts engines find in their caches, when conversations go through a router.

Each turn's prompt is all that was said before and something new:

    turn 1   system | question 1
    turn 2   system | question 1 | answer 1 | question 2
             '------ in the cache of the engine that had turn 1, unless it was evicted -----'

*Hit rate*: prompt tokens found in the cache / prompt tokens. It is compared with one engine that is
as large and as fast as all of them together, and serves the same requests at the same times.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.router_sim.engines import Clock, Job, Machine, SimulatedEngine
from benchmarks.router_sim.queues import SimulatedRouter
from router.peek import PROMPT_BYTES, TEXT_BYTES
from router.policies import Policy

CACHE_BLOCK = 16
"""Tokens."""


@dataclass(frozen=True)
class Conversations:
    """A workload. Lengths are means, in tokens, of geometric distributions but for the systems'."""

    count: int = 400
    per_second: float = 2.0
    systems: int = 8
    """Different beginnings that conversations share, drawn alike."""
    system_tokens: int = 600
    turns: int = 6
    question_tokens: int = 120
    answer_tokens: int = 200
    pause_seconds: float = 8.0
    """Between an answer and the next question, exponential."""


@dataclass(frozen=True)
class Turn:
    """What a conversation says next."""

    question: bytes
    answer: bytes
    pause: float


@dataclass
class Conversation:
    arrival: float
    said: bytes
    """So far."""
    turns: list[Turn]


def conversations(of: Conversations, seed: int) -> list[Conversation]:
    draw = random.Random(seed)

    def text(tokens: int) -> bytes:
        return draw.randbytes(tokens * TEXT_BYTES)

    def geometric(mean: float) -> int:
        return 1 + int(draw.expovariate(1.0 / max(mean - 1, 1e-9)))

    systems = [text(of.system_tokens) for _ in range(of.systems)]
    now, found = 0.0, []
    for _ in range(of.count):
        now += draw.expovariate(of.per_second)
        turns = [
            Turn(
                text(geometric(of.question_tokens)),
                text(geometric(of.answer_tokens)),
                draw.expovariate(1.0 / of.pause_seconds),
            )
            for _ in range(geometric(of.turns))
        ]
        found.append(Conversation(now, draw.choice(systems), turns))
    return found


class CachingEngine(SimulatedEngine):
    """Keeps blocks of what it has computed, the least recently used one goes first."""

    def __init__(self, *args: object, cache_tokens: int) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._room = cache_tokens // CACHE_BLOCK
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def start(self, job: Job) -> None:
        names = _cache_names(job.text)
        hits = 0
        while hits < len(names) and names[hits] in self._blocks:
            hits += 1
        # The last token is computed in any case: its logits are wanted.
        job.cached_tokens = min(hits * CACHE_BLOCK, job.prompt_tokens - 1)
        self._keep(names)
        super().start(job)

    def keep(self, text: bytes) -> None:
        self._keep(_cache_names(text))

    def _keep(self, names: Sequence[bytes]) -> None:
        for name in reversed(names):  # the end of a chain is of no use without its beginning
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        while len(self._blocks) > self._room:
            self._blocks.popitem(last=False)


def _cache_names(text: bytes) -> list[bytes]:
    """Hash of each beginning that is whole blocks long."""
    size = CACHE_BLOCK * TEXT_BYTES
    names, name = [], b""
    for end in range(size, len(text) + 1, size):
        name = hash((name, text[end - size : end])).to_bytes(8, "little", signed=True)
        names.append(name)
    return names


@dataclass(frozen=True)
class Outcome:
    hit_rate: float
    p99_wait: float
    shares: tuple[float, ...]
    """Of the requests, by engine."""


def run(
    of: Conversations,
    machines: Sequence[Machine],
    cache_tokens: int,
    policy: Policy,
    *,
    seed: int = 1,
    interval: float = 0.2,
) -> Outcome:
    """All conversations to their ends. cache_tokens: of each engine."""
    clock = Clock()
    talks = conversations(of, seed)
    left = sum(len(talk.turns) for talk in talks)
    jobs: list[Job] = []
    speaking: dict[int, Conversation] = {}
    went: dict[int, CachingEngine] = {}

    def ask(talk: Conversation) -> None:
        turn = talk.turns[0]
        talk.said += turn.question
        tokens = len(talk.said) // TEXT_BYTES
        job = Job(
            len(jobs), clock.now, tokens, len(turn.answer) // TEXT_BYTES, tokens,
            prompt=talk.said[:PROMPT_BYTES], text=talk.said,
            session=str(talks.index(talk)).encode(),
        )  # fmt: skip
        jobs.append(job)
        speaking[job.number] = talk
        went[job.number] = by_name[router.send(job)]

    def done(job: Job) -> None:
        nonlocal left
        left -= 1
        router.ended(job)
        talk = speaking.pop(job.number)
        turn = talk.turns.pop(0)
        talk.said += turn.answer
        went[job.number].keep(talk.said)
        if talk.turns:
            clock.at(clock.now + turn.pause, lambda: ask(talk))

    engines = [
        CachingEngine(f"e{n}", machine, clock, done, cache_tokens=cache_tokens)
        for n, machine in enumerate(machines)
    ]
    by_name = {engine.name: engine for engine in engines}
    router = SimulatedRouter(engines, policy, clock, seed)
    router.begin(interval, lambda: left > 0)
    for talk in talks:
        clock.at(talk.arrival, lambda talk=talk: ask(talk))  # type: ignore[misc]
    clock.run(lambda: left == 0)
    waits = sorted(job.wait for job in jobs)
    per_engine = [sum(engine is each for each in went.values()) for engine in engines]
    return Outcome(
        sum(job.cached_tokens for job in jobs) / sum(job.prompt_tokens for job in jobs),
        waits[int(0.99 * len(waits))],
        tuple(count / len(jobs) for count in per_engine),
    )


def pooled(machines: Sequence[Machine]) -> Machine:
    """One engine that is all of them together."""
    return replace(
        machines[0],
        prefill_tokens_per_second=sum(m.prefill_tokens_per_second for m in machines),
        kv_tokens=sum(m.kv_tokens for m in machines),
    )
