"""The three real services together: exactness on both tiers, nothing lost, nothing leaked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from protos.neo.v1 import types_pb2
from tests.support.load import (
    Answer,
    Job,
    assert_idle_and_whole,
    random_jobs,
    run_job,
    run_jobs,
)
from tests.support.stack import running_stack, stack_model

CLIENTS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stack_model(tmp_path_factory.mktemp("model"))


async def alone(address: str, jobs: list[Job]) -> list[Answer]:
    """Each request by itself, on the GPU tier: what its tokens must be."""
    lonely = [
        replace(job, cancel_after=None, placement=types_pb2.PLACEMENT_GPU_ONLY) for job in jobs
    ]
    return await run_jobs(address, lonely, concurrency=1)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_always_decodes_on_the_host_tier(tmp_path: Path, model: Path, transport: str) -> None:
    job = Job(prompt=tuple(range(3, 60)), output_tokens=24)
    with running_stack(tmp_path, model, offload="always", offload_transport=transport) as stack:
        offloaded = await run_job(stack.router.address, job)
        load = await assert_idle_and_whole(stack.gpu.address)
    with running_stack(tmp_path, model, offload="never", cpu_services=[]) as stack:
        reference = await run_job(stack.router.address, job)
    assert offloaded.error is None
    assert offloaded.usage is not None
    assert offloaded.usage.host_tokens == 24
    assert offloaded.usage.gpu_tokens == 0
    assert load.host.tokens_total == 24
    assert offloaded.tokens == reference.tokens


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_64_clients_with_migrations_and_cancellations(
    tmp_path: Path, model: Path, transport: str
) -> None:
    """A GPU pool of a few requests, forced migrations, a quarter of the clients giving up: every
    other stream has the tokens that it has alone, and all blocks come back."""
    jobs = random_jobs(CLIENTS, seed=11, cancelled=0.25)
    settings = {
        "gpu_kv_blocks": 40, "force_migration_every": 7, "offload_transport": transport,
        "max_batch_tokens": 64,
    }  # fmt: skip
    with running_stack(tmp_path, model, **settings) as stack:
        answers = await run_jobs(stack.router.address, jobs)
        load = await assert_idle_and_whole(stack.gpu.address)
        references = await alone(stack.router.address, jobs)
        await assert_idle_and_whole(stack.gpu.address)
    for job, answer, reference in zip(jobs, answers, references, strict=True):
        assert reference.error is None
        assert len(reference.tokens) == job.output_tokens
        if job.cancel_after is None:
            assert answer.error is None
            assert answer.tokens == reference.tokens
            assert answer.usage is not None
            assert answer.usage.completion_tokens == job.output_tokens
            assert answer.usage.gpu_tokens + answer.usage.host_tokens == job.output_tokens
        else:
            assert answer.tokens == reference.tokens[: len(answer.tokens)]
    assert load.gpu.tokens_total > 0
    assert load.host.tokens_total > 0
    assert load.demotions_total > 0
    assert load.promotions_total > 0
