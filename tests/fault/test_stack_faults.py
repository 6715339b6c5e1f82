"""What clients see when the cpu_service dies, stops or stays away, with the real processes."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc
import pytest

from protos.neo.v1 import types_pb2
from tests.support.load import (
    Answer,
    Job,
    assert_idle_and_whole,
    run_job,
    run_jobs,
    watch_load,
)
from tests.support.stack import Stack, running_stack, stack_model

LONG = Job(
    prompt=tuple(range(3, 40)), output_tokens=400, placement=types_pb2.PLACEMENT_CPU_PREFERRED
)
LONG_GPU = Job(
    prompt=tuple(range(3, 40)), output_tokens=400, placement=types_pb2.PLACEMENT_GPU_ONLY
)

MODES = ("inline", "deferred", "asymmetric")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stack_model(tmp_path_factory.mktemp("model"))


def on_host(stack: Stack) -> asyncio.Task[list[Answer]]:
    """Two requests, of which asymmetric mode makes a sub-batch each."""
    return asyncio.create_task(run_jobs(stack.router.address, [LONG, LONG]))


async def until_host_decodes(stack: Stack, tokens: int) -> None:
    async for load in watch_load(stack.gpu.address, interval_ms=10):
        if load.host.tokens_total >= tokens:
            return


@pytest.mark.parametrize("mode", MODES)
async def test_host_requests_survive_a_killed_cpu_service(
    tmp_path: Path, model: Path, mode: str
) -> None:
    """SIGKILL mid-stream, restart: the same tokens as without, none recomputed."""
    with running_stack(tmp_path, model, offload_mode=mode) as stack:
        reference = await run_job(stack.router.address, LONG_GPU)
        host = on_host(stack)
        await until_host_decodes(stack, 20)
        stack.cpu.signal(signal.SIGKILL)
        stack.cpu.wait_exit()
        beside = await run_job(stack.router.address, LONG_GPU)
        assert not host.done(), "nothing can decode on the host tier while it is away"
        stack.cpu.start()
        answers = await asyncio.wait_for(host, timeout=60)
        load = await assert_idle_and_whole(stack.gpu.address)
    assert beside.tokens == reference.tokens
    for answer in answers:
        assert answer.error is None
        assert answer.tokens == reference.tokens
        assert answer.usage is not None
        assert answer.usage.recomputations == 0
    assert load.recomputations_total == 0


@pytest.mark.parametrize("mode", MODES)
async def test_a_stopped_cpu_service_is_survived(tmp_path: Path, model: Path, mode: str) -> None:
    """SIGSTOP past the sweep's deadline, then SIGCONT: no hang, no wrong token."""
    with running_stack(tmp_path, model, sweep_deadline_ms=300.0, offload_mode=mode) as stack:
        reference = await run_job(stack.router.address, LONG_GPU)
        host = on_host(stack)
        await until_host_decodes(stack, 20)
        stack.cpu.signal(signal.SIGSTOP)
        beside = await run_job(stack.router.address, LONG_GPU)
        stack.cpu.signal(signal.SIGCONT)
        answers = await asyncio.wait_for(host, timeout=60)
        await assert_idle_and_whole(stack.gpu.address)
    assert beside.tokens == reference.tokens
    for answer in answers:
        assert answer.error is None
        assert answer.tokens == reference.tokens


@pytest.mark.parametrize("mode", MODES)
async def test_lease_expiry_ends_host_requests_only(tmp_path: Path, model: Path, mode: str) -> None:
    """A cpu_service that stays away: its requests end with UNAVAILABLE, the others do not notice,
    and new requests are served on the GPU tier."""
    with running_stack(tmp_path, model, lease_seconds=2.0, offload_mode=mode) as stack:
        host = on_host(stack)
        await until_host_decodes(stack, 20)
        stack.cpu.signal(signal.SIGKILL)
        beside = asyncio.create_task(run_job(stack.router.address, LONG_GPU))
        answers = await asyncio.wait_for(host, timeout=30)
        assert [answer.error for answer in answers] == [grpc.StatusCode.UNAVAILABLE] * 2
        assert (await beside).error is None
        after = await run_job(stack.router.address, LONG)
        assert after.error is None
        assert after.usage is not None
        assert after.usage.host_tokens == 0
        stack.cpu.start()
        stack.cpu.wait_serving()


async def test_deadline_frees_blocks(tmp_path: Path, model: Path) -> None:
    """A deadline that passes mid-stream ends the request and gives its blocks back."""
    endless = Job(prompt=tuple(range(3, 40)), output_tokens=3000)
    with running_stack(tmp_path, model, max_context_tokens=4096) as stack:
        answer = await run_job(stack.router.address, endless, seconds=1.0)
        assert answer.error == grpc.StatusCode.DEADLINE_EXCEEDED
        assert answer.tokens
        await assert_idle_and_whole(stack.gpu.address)
