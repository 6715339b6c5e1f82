"""Sends the requests and writes down when what came."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from neo_client.bench.load import Session
from neo_client.bench.prompts import PromptMaker
from neo_client.bench.sample import Sample
from neo_client.options import Prompt, is_chat
from neo_common.errors import ErrorDetails
from protos.neo.v1 import inference_pb2 as inference

TICK_SECONDS = 0.1
"""Tokens over time are counted that finely."""

Messages = AsyncGenerator[inference.GenerateStreamResponse]
Caller = Callable[[Prompt, int], Messages]
"""Starts a request for so many output tokens."""


@dataclass(frozen=True)
class Pace:
    """How requests follow each other."""

    is_open: bool
    """Sessions come when they are due; else when one of `concurrency` workers is free."""
    concurrency: int = 8
    max_in_flight: int = 4096
    """Sessions under way in an open loop; further ones are held back, and their latencies counted
    from when they were due."""
    seconds: float | None = None
    """A closed loop begins nothing after that."""
    think_seconds: float = 0.0
    """Between an answer and the next turn."""
    warmup: int = 0
    """First sessions, which figures leave out."""


@dataclass
class Driver:
    """One run. Read while it goes for progress; used by one event loop."""

    call: Caller
    prompts: PromptMaker
    pace: Pace
    clock: Callable[[], float] = time.perf_counter
    samples: list[Sample] = field(default_factory=list)
    """Of ended requests, in the order of their ends."""
    started: int = 0
    live: int = 0
    held_back: int = 0
    """Sessions that waited for another one to end, though they were due."""
    dropped_turns: int = 0
    """Turns behind one that failed."""
    ticks: Counter[int] = field(default_factory=Counter)
    """Tick -> tokens that came in it."""
    begun: float | None = None
    """Of the clock."""

    def now(self) -> float:
        """Seconds since the start."""
        return 0.0 if self.begun is None else self.clock() - self.begun

    async def run(self, sessions: Iterable[Session]) -> None:
        """Until all have ended. When cancelled, requests under way are, too, and not counted."""
        self.begun = self.clock()
        if self.pace.is_open:
            await self._open(sessions)
        else:
            await self._closed(iter(sessions))

    async def _open(self, sessions: Iterable[Session]) -> None:
        slots = asyncio.Semaphore(self.pace.max_in_flight)
        async with asyncio.TaskGroup() as group:
            for session in sessions:
                assert session.due is not None
                await self._until(session.due)
                # Only here does anything wait, so that no more tasks exist than there are slots.
                self.held_back += slots.locked()
                await slots.acquire()
                task = group.create_task(self._session(session, session.due))
                task.add_done_callback(lambda _: slots.release())

    async def _closed(self, sessions: Iterator[Session]) -> None:
        async def worker() -> None:
            for session in sessions:
                if self.pace.seconds is not None and self.now() >= self.pace.seconds:
                    return
                await self._session(session, self.now())

        async with asyncio.TaskGroup() as group:
            for _ in range(self.pace.concurrency):
                group.create_task(worker())

    async def _until(self, due: float) -> None:
        # Again where a timer fires early: loops count in milliseconds.
        while (left := due - self.now()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)

    async def _session(self, session: Session, due: float) -> None:
        context = [] if session.prefix is None else self.prompts.prefix(session.prefix)
        for number, turn in enumerate(session.turns):
            if number:
                due = self.now() + self.pace.think_seconds
                await self._until(due)
            prompt = session.prompt
            if prompt is None:
                context += self.prompts.turn(session.number, number, turn.prompt)
                prompt = context
            sample, answer = await self._request(session, number, due, prompt)
            if not sample.ok:
                self.dropped_turns += len(session.turns) - number - 1
                return
            context += answer

    async def _request(
        self, session: Session, turn: int, due: float, prompt: Prompt
    ) -> tuple[Sample, list[int]]:
        sample = Sample(
            session=session.number, turn=turn, due=due, sent=self.now(),
            prompt_tokens=0 if isinstance(prompt, str) or is_chat(prompt) else len(prompt),
            wanted_tokens=session.turns[turn].output, warmup=session.number < self.pace.warmup,
        )  # fmt: skip
        answer: list[int] = []
        self.started += 1
        self.live += 1
        try:
            async with aclosing(self.call(prompt, sample.wanted_tokens)) as messages:
                async for message in messages:
                    self._take(sample, answer, message)
        except grpc.RpcError as error:
            status: Any = error
            sample.code, sample.reason = status.code().name, ErrorDetails(error).reason
        finally:
            self.live -= 1
        sample.end = self.now()
        self.samples.append(sample)
        return sample, answer

    def _take(
        self, sample: Sample, answer: list[int], message: inference.GenerateStreamResponse
    ) -> None:
        now = self.now()
        came = 0
        for delta in message.deltas:
            answer.extend(delta.token_ids)
            came += len(delta.token_ids)
        if came:
            sample.take(came, now)
            self.ticks[int(now / TICK_SECONDS)] += came
        if message.HasField("usage"):
            sample.usage = message.usage
            sample.prompt_tokens = message.usage.prompt_tokens
