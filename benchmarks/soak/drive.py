"""An open loop of asks, each answer checked against the known one."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from benchmarks.soak.asks import Answer, Ask, Asker, Manner
from neo_common.errors import ErrorDetails

MAX_IN_FLIGHT = 400
"""Asks under way; what comes beyond is left out and counted."""
MAX_KEPT = 20
"""Descriptions of failures."""

Excuse = Callable[[float, float], bool]
"""Whether a fault was on in the time between two readings of the clock."""


@dataclass
class Window:
    """What ended within some seconds."""

    ends: Counter[str] = field(default_factory=Counter)
    """`ok`, `cancelled`, or a status with its reason -> asks."""
    ttft_ms: list[float] = field(default_factory=list)
    e2e_ms: list[float] = field(default_factory=list)
    """Of streams that ended well."""
    tokens: int = 0
    host_tokens: int = 0
    left_out: int = 0


@dataclass
class Got:
    """What came of one ask."""

    choices: dict[int, list[int]] = field(default_factory=dict)
    first: float | None = None
    completion: int | None = None
    """By its usage; None: it did not come."""
    host_tokens: int = 0
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    retry_after: float | None = None

    @property
    def tokens(self) -> int:
        return sum(len(tokens) for tokens in self.choices.values())

    def take(self, choices: Any, usage: Any) -> None:
        for choice in choices:
            self.choices.setdefault(choice.index, []).extend(choice.token_ids)
        if usage is not None:
            self.completion, self.host_tokens = usage.completion_tokens, usage.host_tokens

    @property
    def end(self) -> str:
        return "/".join(filter(None, (self.code.name, self.reason)))


class Driver:
    """Sends asks through one client's stub. Used by one event loop."""

    def __init__(
        self, stub: Any, asker: Asker, golden: Mapping[int, Answer], excuse: Excuse
    ) -> None:
        self._stub = stub
        self._asker = asker
        self._golden = golden
        self._excuse = excuse
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.window = Window()
        self.total: Counter[str] = Counter()
        self.checked = 0
        """Answers that were whole and compared."""
        self.failures: list[str] = []
        self.failed: Counter[str] = Counter()
        """Kind of failure -> how many."""
        self.excused: Counter[str] = Counter()

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    async def open_loop(self, rate: Callable[[], float], seconds: float, seed: int) -> None:
        """Poisson's process of a rate that may change; returns when its last ask has ended."""
        draw = random.Random(seed)
        due = time.monotonic()
        end = due + seconds
        while (due := due + draw.expovariate(rate())) < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if not self._open.is_set():
                await self._open.wait()
                due = time.monotonic()
            if self.in_flight >= MAX_IN_FLIGHT:
                self.window.left_out += 1
                continue
            self._begin()
        await self._idle.wait()

    async def closed_loop(self, workers: int, seconds: float) -> float:
        """Asks per second that `workers` get through."""
        end, done = time.monotonic() + seconds, 0

        async def worker() -> None:
            nonlocal done
            while time.monotonic() < end:
                await self._ask(self._asker.next())
                done += 1

        began = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(workers)))
        return done / (time.monotonic() - began)

    async def pause(self) -> None:
        """Begin nothing more; returns when all has ended."""
        self._open.clear()
        await self._idle.wait()

    def resume(self) -> None:
        self._open.set()

    def take_window(self) -> Window:
        taken, self.window = self.window, Window()
        return taken

    def fail(self, kind: str, what: str) -> None:
        self.failed[kind] += 1
        if len(self.failures) < MAX_KEPT:
            self.failures.append(f"{kind}: {what}")
            print(f"FAILURE {kind}: {what}", flush=True)

    def _begin(self) -> None:
        task = asyncio.create_task(self._ask(self._asker.next()))
        self._tasks.add(task)
        self._idle.clear()
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail("client", repr(error))

    async def _ask(self, ask: Ask) -> None:
        began, got = time.monotonic(), Got()
        try:
            if ask.manner is Manner.UNARY:
                answer = await self._stub.Generate(ask.request, timeout=ask.seconds)
                got.take(answer.choices, answer.usage)
            else:
                await self._stream(ask, got)
        except grpc.aio.AioRpcError as error:
            details = ErrorDetails(error)
            got.code, got.reason = error.code(), details.reason
            got.retry_after = details.retry_after
        self._account(ask, got, began, time.monotonic())

    async def _stream(self, ask: Ask, got: Got) -> None:
        call = self._stub.GenerateStream(ask.request, timeout=ask.seconds)
        cancels = ask.manner is Manner.CANCEL
        if cancels and not ask.cancel_after:
            await asyncio.sleep(0.002)
            call.cancel()
            got.code = grpc.StatusCode.CANCELLED
            return
        async for message in call:
            if got.first is None:
                got.first = time.monotonic()
            got.take(message.deltas, message.usage if message.HasField("usage") else None)
            if cancels and got.tokens >= ask.cancel_after:
                call.cancel()
                got.code = grpc.StatusCode.CANCELLED
                return

    def _account(self, ask: Ask, got: Got, began: float, ended: float) -> None:
        self.window.ends[got.end] += 1
        self.total[got.end] += 1
        self.window.tokens += got.tokens
        self.window.host_tokens += got.host_tokens
        if got.code is grpc.StatusCode.OK and got.first is not None:
            self.window.ttft_ms.append(1e3 * (got.first - began))
            self.window.e2e_ms.append(1e3 * (ended - began))
        if ask.question is not None:
            self._compare(ask, got)
        wrong = wrong_end(ask, got)
        if wrong is None:
            return
        if got.code is grpc.StatusCode.UNAVAILABLE and self._excuse(began, ended):
            self.excused[got.end] += 1
        else:
            self.fail("end", f"{ask.manner.value} after {ended - began:.2f} s: {got.end}; {wrong}")

    def _compare(self, ask: Ask, got: Got) -> None:
        assert ask.question is not None
        golden = self._golden[ask.question.number]
        whole = got.code is grpc.StatusCode.OK
        if whole:
            self.checked += 1
            if got.completion != got.tokens:
                self.fail("usage", f"{got.completion} tokens by usage, {got.tokens} came")
        for index, known in enumerate(golden):
            tokens = tuple(got.choices.get(index, ()))
            if tokens != (known if whole else known[: len(tokens)]):
                at = next(
                    (i for i, (a, b) in enumerate(zip(tokens, known, strict=False)) if a != b), -1
                )
                self.fail(
                    "tokens",
                    f"question {ask.question.number}, choice {index}, "
                    f"placement {ask.request.scheduling.placement}, {got.end}: {len(tokens)} of "
                    f"{len(known)} tokens, first wrong one at {at}",
                )


def wrong_end(ask: Ask, got: Got) -> str | None:
    """What is wrong with the way that it ended; None: nothing."""
    code = got.code
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return None if got.retry_after else "no retry delay"
    match ask.manner:
        case Manner.REFUSED:
            right = code is grpc.StatusCode.INVALID_ARGUMENT and got.reason == ask.reason
            return None if right else f"wanted {ask.reason}"
        case Manner.CANCEL:
            ends = {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED}
        case Manner.DEADLINE:
            ends = {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}
        case _:
            ends = {grpc.StatusCode.OK}
    return None if code in ends else "not an end of this manner"
