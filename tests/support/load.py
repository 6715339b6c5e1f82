"""Clients that hammer a running stack, and what must be true of it afterwards."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc

from neo_common.errors import ErrorDetails
from protos.neo.v1 import engine_pb2, engine_pb2_grpc, inference_pb2_grpc, types_pb2
from protos.neo.v1 import inference_pb2 as inference

VOCABULARY = 96
"""Token ids that any tiny test model has."""


@dataclass(frozen=True)
class Job:
    """One greedy request: its prompt, its length, and after how many tokens its client gives up.
    salt: finds KV of no others but those with the same."""

    prompt: tuple[int, ...]
    output_tokens: int
    cancel_after: int | None = None
    placement: int = types_pb2.PLACEMENT_AUTO
    salt: str = ""

    def request(self) -> inference.GenerateRequest:
        return inference.GenerateRequest(
            token_ids=types_pb2.TokenIds(ids=self.prompt),
            sampling=types_pb2.SamplingParams(
                temperature=0, max_tokens=self.output_tokens, ignore_eos=True
            ),
            scheduling=types_pb2.SchedulingParams(placement=self.placement, cache_salt=self.salt),
            token_ids_only=True,
        )


@dataclass
class Answer:
    """What came back: tokens in order, the usage if the stream ended by itself, else the error and
    its reason."""

    tokens: list[int]
    usage: types_pb2.Usage | None = None
    error: grpc.StatusCode | None = None
    reason: str = ""


def random_jobs(count: int, seed: int, *, cancelled: float = 0.0) -> list[Job]:
    """Mixed lengths, from one token to several chunks and blocks."""
    draw = random.Random(seed)
    jobs = []
    for _ in range(count):
        prompt = tuple(
            draw.randrange(3, VOCABULARY) for _ in range(draw.choice([1, 7, 16, 33, 90, 200]))
        )
        output = draw.choice([1, 2, 15, 16, 17, 40])
        cancel = draw.randrange(1, output + 1) if draw.random() < cancelled else None
        jobs.append(Job(prompt, output, cancel))
    return jobs


async def run_job(
    address: str,
    job: Job,
    seconds: float = 120.0,
    told: Callable[[Answer], None] = lambda _: None,
) -> Answer:
    """`told`: called with the answer so far, after each message."""
    answer = Answer([])
    async with grpc.aio.insecure_channel(address) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(
            job.request(), timeout=seconds
        )
        try:
            async for message in call:
                for delta in message.deltas:
                    answer.tokens += delta.token_ids
                if message.HasField("usage"):
                    answer.usage = message.usage
                told(answer)
                if job.cancel_after is not None and len(answer.tokens) >= job.cancel_after:
                    call.cancel()
                    break
        except grpc.aio.AioRpcError as error:
            answer.error, answer.reason = error.code(), ErrorDetails(error).reason
    return answer


class Stream:
    """A job that runs in the background, and whose answer so far can be looked at."""

    def __init__(self, address: str, job: Job, seconds: float = 120.0) -> None:
        self.job = job
        self.tokens = 0
        self._news = asyncio.Event()
        self.task = asyncio.create_task(run_job(address, job, seconds, self._told))
        self.task.add_done_callback(lambda _: self._news.set())

    def _told(self, answer: Answer) -> None:
        self.tokens = len(answer.tokens)
        self._news.set()

    async def until(self, tokens: int) -> None:
        """Until that many tokens have come; fails when the stream ends before."""
        while self.tokens < tokens:
            assert not self.task.done(), f"ended after {self.tokens} tokens: {self.task.result()}"
            self._news.clear()
            await self._news.wait()


async def run_jobs(address: str, jobs: list[Job], concurrency: int | None = None) -> list[Answer]:
    gate = asyncio.Semaphore(concurrency or len(jobs))

    async def gated(job: Job) -> Answer:
        async with gate:
            return await run_job(address, job)

    return await asyncio.gather(*(gated(job) for job in jobs))


async def watch_load(
    gpu_address: str, interval_ms: int, seconds: float = 60.0
) -> AsyncIterator[engine_pb2.LoadSnapshot]:
    async with grpc.aio.insecure_channel(gpu_address) as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).WatchLoad(
            engine_pb2.WatchLoadRequest(interval_ms=interval_ms), timeout=seconds
        )
        async for message in call:
            yield message.load


async def assert_idle_and_whole(gpu_address: str, seconds: float = 10.0) -> engine_pb2.LoadSnapshot:
    """Soon after the last client has gone, nothing runs and every block of both tiers is free."""
    give_up = time.monotonic() + seconds
    async for load in watch_load(gpu_address, interval_ms=50, seconds=seconds + 5):
        busy = load.waiting_requests or load.gpu.running_requests or load.host.running_requests
        whole = (
            load.gpu.free_blocks == load.gpu.total_blocks
            and load.host.free_blocks == load.host.total_blocks
        )
        if not busy and whole:
            return load
        assert time.monotonic() < give_up, f"still busy or leaking:\n{load}"
    raise AssertionError("the load stream ended")
