"""Offers more than is taken, and writes down what became of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from neo_common.errors import ErrorDetails
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

VOCABULARY = 300
DEADLINE_SECONDS = 120.0


@dataclass(frozen=True)
class Shape:
    prompt_tokens: int
    output_tokens: int

    def request(self, draw: random.Random) -> inference.GenerateRequest:
        return inference.GenerateRequest(
            token_ids=types.TokenIds(
                ids=[draw.randrange(3, VOCABULARY) for _ in range(self.prompt_tokens)]
            ),
            sampling=types.SamplingParams(
                temperature=0, max_tokens=self.output_tokens, ignore_eos=True
            ),
            token_ids_only=True,
        )


@dataclass
class Seen:
    """Of one phase. Seconds."""

    offered: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    ok_at: list[float] = field(default_factory=list)
    """Since the phase began."""
    e2e: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)
    """As the engine says, of those that ended well."""
    refused: list[float] = field(default_factory=list)
    """Until each refusal."""
    retry_after: list[float] = field(default_factory=list)
    unexplained: int = 0
    """Refusals without a reason or a delay."""
    over: float = 0.0
    """Reading of the clock when nothing more was offered."""
    late: float = 0.0
    """Most that a request left after it was due: the sender's own limit."""


class Sender:
    """One client. Used by one event loop."""

    def __init__(self, stub: Any, seed: int) -> None:
        self._stub = stub
        self._draw = random.Random(seed)

    async def one(self, shape: Shape, seen: Seen, began: float) -> None:
        sent = time.perf_counter()
        request = shape.request(self._draw)
        try:
            usage = None
            async for message in self._stub.GenerateStream(request, timeout=DEADLINE_SECONDS):
                usage = message.usage if message.HasField("usage") else usage
        except grpc.aio.AioRpcError as error:
            self._refused(error, seen, time.perf_counter() - sent)
            return
        now = time.perf_counter()
        if usage is None or usage.completion_tokens != shape.output_tokens:
            seen.ends["INCOMPLETE"] += 1
            return
        seen.ends["OK"] += 1
        seen.ok_at.append(now - began)
        seen.e2e.append(now - sent)
        seen.queue.append(usage.queue_seconds)

    def _refused(self, error: grpc.aio.AioRpcError, seen: Seen, took: float) -> None:
        details = ErrorDetails(error)
        seen.ends[f"{error.code().name}/{details.reason}"] += 1
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            return
        seen.refused.append(took)
        if details.retry_after and details.reason:
            seen.retry_after.append(details.retry_after)
        else:
            seen.unexplained += 1

    async def closed(self, shape: Shape, workers: int, seconds: float) -> float:
        """Requests per second that end well, until the last one has."""
        seen, began = Seen(), time.perf_counter()

        async def worker() -> None:
            while time.perf_counter() < began + seconds:
                await self.one(shape, seen, began)

        await asyncio.gather(*(worker() for _ in range(workers)))
        return len(seen.ok_at) / seen.ok_at[-1]

    async def open(self, shape: Shape, rate: float, seconds: float) -> Seen:
        """Poisson's process; returns when all it sent has ended."""
        seen, began = Seen(), time.perf_counter()
        due = began
        async with asyncio.TaskGroup() as group:
            while (due := due + self._draw.expovariate(rate)) < began + seconds:
                await asyncio.sleep(due - time.perf_counter())
                seen.late = max(seen.late, time.perf_counter() - due)
                seen.offered += 1
                group.create_task(self.one(shape, seen, began))
            seen.over = began + seconds
        return seen

    async def cancels(self, shape: Shape, rate: float, seconds: float) -> tuple[int, Counter[str]]:
        """Requests that are given up as soon as they were sent; returns how many, and how those
        ended that were not."""
        ends: Counter[str] = Counter()
        began, count = time.perf_counter(), 0

        async def one() -> None:
            call = self._stub.GenerateStream(shape.request(self._draw))
            await asyncio.sleep(self._draw.random() * 0.02)
            if not call.cancel():
                ends[(await call.code()).name] += 1

        async with asyncio.TaskGroup() as group:
            while (due := began + count / rate) < began + seconds:
                await asyncio.sleep(due - time.perf_counter())
                group.create_task(one())
                count += 1
        return count, ends


def goodput(seen: Seen, seconds: float, skipped: float) -> float:
    """Ends per second within the phase, without its beginning, when queues fill."""
    inside = [at for at in seen.ok_at if skipped <= at <= seconds]
    return len(inside) / (seconds - skipped)


def quantiles(values: Sequence[float], scale: float = 1e3) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(values)
    pick: Callable[[int], float] = lambda part: ordered[  # noqa: E731
        min(len(ordered) - 1, part * len(ordered) // 100)
    ]
    return {f"p{part}": round(scale * pick(part), 2) for part in (50, 99, 100)} if ordered else {}
