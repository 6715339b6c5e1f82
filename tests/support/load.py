"""Clients that hammer a running stack, and what must be true of it afterwards."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from protos.neo.v1 import engine_pb2, engine_pb2_grpc, inference_pb2_grpc, types_pb2
from protos.neo.v1 import inference_pb2 as inference

VOCABULARY = 96
"""Token ids that any tiny test model has."""


@dataclass(frozen=True)
class Job:
    """One greedy request: its prompt, its length, and after how many tokens its client gives up."""

    prompt: tuple[int, ...]
    output_tokens: int
    cancel_after: int | None = None
    placement: int = types_pb2.PLACEMENT_AUTO

    def request(self) -> inference.GenerateRequest:
        return inference.GenerateRequest(
            token_ids=types_pb2.TokenIds(ids=self.prompt),
            sampling=types_pb2.SamplingParams(
                temperature=0, max_tokens=self.output_tokens, ignore_eos=True
            ),
            scheduling=types_pb2.SchedulingParams(placement=self.placement),
            token_ids_only=True,
        )


@dataclass
class Answer:
    """What came back: tokens in order, the usage if the stream ended by itself, else the error."""

    tokens: list[int]
    usage: types_pb2.Usage | None = None
    error: grpc.StatusCode | None = None


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


async def run_job(address: str, job: Job, seconds: float = 120.0) -> Answer:
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
                if job.cancel_after is not None and len(answer.tokens) >= job.cancel_after:
                    call.cancel()
                    break
        except grpc.aio.AioRpcError as error:
            answer.error = error.code()
    return answer


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
