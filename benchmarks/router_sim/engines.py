"""A simulated engine: what a router sees of one, and when it starts and ends requests.

    arrives ─> queue (first come, first served)
               └─ starts when KV for its prompt and output is free and no other prompt is computed
                  └─ prompt: tokens / prefill rate, one prompt at a time
                     └─ output: a token every `token_seconds`, however many decode ─> KV is free

*Wait* is the time in the queue. Both resources can be what a request waits for.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gpu_service.engine.statistics import Rate
from protos.neo.v1 import engine_pb2 as engine

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Machine:
    """Of one engine."""

    prefill_tokens_per_second: float
    token_seconds: float
    """Between two tokens of a request."""
    kv_tokens: int


@dataclass
class Job:
    """One request. Times in seconds; -1: not yet."""

    number: int
    arrival: float
    prompt_tokens: int
    output_tokens: int
    told_tokens: int = 0
    """What a router takes for the length of the prompt."""
    prompt: bytes = b""
    """How it begins, for policies that look at that."""
    text: bytes = b""
    """The whole of it, for engines with a cache."""
    session: bytes = b""
    cached_tokens: int = 0
    """Of the prompt, found in the engine's cache."""
    started: float = -1.0
    ended: float = -1.0
    first_message: Callable[[], None] = lambda: None
    """Called when its prompt is computed."""

    @property
    def kv_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def wait(self) -> float:
        return self.started - self.arrival


class Clock:
    """Simulated time, and what is to happen at which."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), action))

    def run(self, until: Callable[[], bool]) -> None:
        """Do what is due, in order, until that holds."""
        while self._events and not until():
            self.now, _, action = heapq.heappop(self._events)
            action()


class SimulatedEngine:
    """Its queue and what runs. done: called with each request that has ended."""

    def __init__(
        self, name: str, machine: Machine, clock: Clock, done: Callable[[Job], None]
    ) -> None:
        self.name = name
        self.machine = machine
        self.waiting: deque[Job] = deque()
        self.running = 0
        self.used_tokens = 0
        self._clock = clock
        self._done = done
        self.prefill_free = 0.0
        self._freed = Rate()
        self._freed_since = 0.0
        self._prefilled = Rate()

    def can_start(self, job: Job) -> bool:
        """Now, were there no queue."""
        room = self.machine.kv_tokens - self.used_tokens
        return self._clock.now >= self.prefill_free and job.kv_tokens <= room

    def submit(self, job: Job) -> None:
        self.waiting.append(job)
        self._advance()

    def start(self, job: Job) -> None:
        now = job.started = self._clock.now
        self.running += 1
        self.used_tokens += job.kv_tokens
        computed = job.prompt_tokens - job.cached_tokens
        prefill = computed / self.machine.prefill_tokens_per_second
        if computed:
            self._prefilled.observe(computed, prefill)
        self.prefill_free = now + prefill
        end = self.prefill_free + job.output_tokens * self.machine.token_seconds
        self._clock.at(self.prefill_free, job.first_message)
        self._clock.at(self.prefill_free, self._advance)
        self._clock.at(end, lambda: self._end(job))

    def _end(self, job: Job) -> None:
        job.ended = self._clock.now
        self.running -= 1
        self.used_tokens -= job.kv_tokens
        self._freed.observe(job.kv_tokens, self._clock.now - self._freed_since)
        self._freed_since = self._clock.now
        self._done(job)
        self._advance()

    def _advance(self) -> None:
        while self.waiting and self.can_start(self.waiting[0]):
            self.start(self.waiting.popleft())

    def snapshot(self) -> engine.LoadSnapshot:
        """As a gpu_service would report it now."""
        total = self.machine.kv_tokens // BLOCK_TOKENS
        return engine.LoadSnapshot(
            state=engine.ENGINE_STATE_SERVING,
            gpu=engine.TierLoad(
                total_blocks=total,
                free_blocks=max(0, total - -(-self.used_tokens // BLOCK_TOKENS)),
                running_requests=self.running,
                freed_tokens_per_second=self._freed.per_second,
            ),
            waiting_requests=len(self.waiting),
            waiting_prompt_tokens=sum(job.prompt_tokens for job in self.waiting),
            block_tokens=BLOCK_TOKENS,
            prompt_tokens_per_second=self._prefilled.per_second,
            instance_id=self.name,
        )
