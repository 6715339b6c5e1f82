"""Two real gpu_services behind a real router, restarted, killed and drained under load."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import openai
import psutil
import pytest

from neo_common.errors import ErrorDetails
from protos.neo.v1 import inference_pb2_grpc, router_pb2, router_pb2_grpc
from router.relay import EOF
from tests.support.load import Answer, Job, run_job, watch_load
from tests.support.stack import Service, free_port, stack_model

LONG = Job(prompt=tuple(range(3, 40)), output_tokens=100)
ENDLESS = Job(prompt=tuple(range(3, 40)), output_tokens=800)
CLIENTS = 2
"""Of each protocol."""
WAIT_SECONDS = 120.0
"""For whatever takes as long as the machine takes; CI's is slow."""


@dataclass
class Fleet:
    router: Service
    gpus: list[Service]

    @property
    def services(self) -> list[Service]:
        return [*self.gpus, self.router]

    @property
    def http(self) -> str:
        return f"http://{self.router.config['http_listen']}/v1"

    async def ready(self) -> None:
        """Start what is down, and wait until the router sees every backend UP."""
        for service in self.services:
            if service.process is None or service.process.poll() is not None:
                service.start()
        for service in self.services:
            await asyncio.to_thread(service.wait_serving)
        up = [router_pb2.BACKEND_STATE_UP] * len(self.gpus)
        await self.until(lambda seen: [backend.state for backend in seen.backends] == up)

    async def until(self, holds: Callable[[router_pb2.WatchBackendsResponse], bool]) -> None:
        """Wait until this holds of what the router says of its backends."""
        async with (
            grpc.aio.insecure_channel(self.router.address) as channel,
            asyncio.timeout(WAIT_SECONDS),
        ):
            call = router_pb2_grpc.RouterServiceStub(channel).WatchBackends(
                router_pb2.WatchBackendsRequest(interval_ms=20)
            )
            async for message in call:
                if holds(message):
                    return


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model = stack_model(tmp_path_factory.mktemp("parent") / "m")
    gpus = []
    for _ in range(2):
        address = f"127.0.0.1:{free_port()}"
        config = {
            "listen": address, "model": str(model), "device": "cpu", "dtype": "float32",
            "threads": 1, "offload": "never", "gpu_kv_gib": 0.0625,
        }  # fmt: skip
        gpus.append(Service("gpu_service", address, config, tmp_path_factory.mktemp("gpu")))
    address = f"127.0.0.1:{free_port()}"
    config = {
        "listen": address, "backends": [gpu.address for gpu in gpus],
        "http_listen": f"127.0.0.1:{free_port()}",
    }  # fmt: skip
    started = Fleet(Service("router", address, config, tmp_path_factory.mktemp("router")), gpus)
    try:
        yield started
    finally:
        for service in reversed(started.services):
            service.stop()


async def until_running(gpu: Service, requests: int) -> None:
    async for load in watch_load(gpu.address, interval_ms=10, seconds=WAIT_SECONDS):
        if load.gpu.running_requests >= requests:
            return


@dataclass
class Streamed:
    """What a client over HTTP got."""

    text: str = ""
    finish: str | None = None


async def over_http(client: openai.AsyncOpenAI, job: Job) -> Streamed:
    got = Streamed()
    stream = await client.completions.create(
        model="m", prompt=list(job.prompt), max_tokens=job.output_tokens, temperature=0,
        stream=True, extra_body={"ignore_eos": True},
    )  # fmt: skip
    async for chunk in stream:
        got.text += chunk.choices[0].text
        got.finish = chunk.choices[0].finish_reason
    return got


@asynccontextmanager
async def under_load(fleet: Fleet) -> AsyncIterator[tuple[list[Answer], list[Streamed]]]:
    """Clients of both protocols, each with a stream open at any time. When the block ends they
    finish what they have."""
    answers: list[Answer] = []
    streamed: list[Streamed] = []
    stop = asyncio.Event()

    async def by_grpc() -> None:
        while not stop.is_set():
            answers.append(await run_job(fleet.router.address, LONG))

    async def by_http(client: openai.AsyncOpenAI) -> None:
        while not stop.is_set():
            streamed.append(await over_http(client, LONG))

    async with (
        openai.AsyncOpenAI(base_url=fleet.http, api_key="none", max_retries=0) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(CLIENTS):
            group.create_task(by_grpc())
            group.create_task(by_http(client))
        try:
            yield answers, streamed
        finally:
            stop.set()


async def test_a_rolling_restart_drops_no_stream(fleet: Fleet) -> None:
    """Each gpu_service gets SIGTERM with streams on it, ends, and comes back; nobody notices."""
    await fleet.ready()
    reference = await run_job(fleet.router.address, LONG)
    async with under_load(fleet) as (answers, streamed):
        for gpu in fleet.gpus:
            await until_running(gpu, 1)
            gpu.signal(signal.SIGTERM)
            assert await asyncio.to_thread(gpu.wait_exit, WAIT_SECONDS) == 0
            await fleet.ready()
    assert len(answers) >= 2 * CLIENTS
    assert len(streamed) >= 2 * CLIENTS
    for answer in answers:
        assert answer.error is None
        assert answer.tokens == reference.tokens
    assert {each.finish for each in streamed} == {"length"}
    assert len({each.text for each in streamed}) == 1
    for gpu in fleet.gpus:
        assert "calls outlived the grace" not in gpu.log


async def test_a_lost_engine_ends_its_own_streams_alone(fleet: Fleet) -> None:
    """kill -9 of an engine core: its streams end with UNAVAILABLE (ENGINE_LOST), the gpu_service
    ends with 1, the other one's streams go on, new requests find it, and a restart is all it
    takes."""
    await fleet.ready()
    lost, other = fleet.gpus
    assert lost.process is not None
    (core,) = psutil.Process(lost.process.pid).children()
    async with (
        grpc.aio.insecure_channel(fleet.router.address) as channel,
        openai.AsyncOpenAI(base_url=fleet.http, api_key="none", max_retries=0) as client,
    ):
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.GenerateStream(ENDLESS.request()) for _ in range(4)]
        http = [asyncio.create_task(over_http(client, ENDLESS)) for _ in range(4)]
        for call in calls:
            await call.read()
        await asyncio.gather(until_running(lost, 1), until_running(other, 1))
        core.kill()
        assert await asyncio.to_thread(lost.wait_exit, WAIT_SECONDS) == 1
        after = await run_job(fleet.router.address, LONG)
        assert after.error is None
        ends = await asyncio.gather(*(end_of(call) for call in calls))
        for code, reason in ends:
            assert (code, reason) in {
                (grpc.StatusCode.OK, ""),
                (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST"),
            }
        assert (grpc.StatusCode.OK, "") in ends, "those of the other gpu_service"
        said = await asyncio.gather(*http, return_exceptions=True)
        broken = [each for each in said if not isinstance(each, Streamed)]
        for error in broken:
            assert isinstance(error, openai.APIError)
            assert error.code == "ENGINE_LOST"
        assert broken or set(ends) != {(grpc.StatusCode.OK, "")}, "the core had streams"
    await fleet.ready()
    assert (await run_job(fleet.router.address, LONG)).tokens == after.tokens


async def end_of(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        while await call.read() is not EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), ErrorDetails(error).reason
    return grpc.StatusCode.OK, ""


async def test_a_draining_router_finishes_streams_and_refuses_the_rest(fleet: Fleet) -> None:
    await fleet.ready()
    async with (
        grpc.aio.insecure_channel(fleet.router.address) as channel,
        openai.AsyncOpenAI(base_url=fleet.http, api_key="none", max_retries=0) as client,
    ):
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.GenerateStream(LONG.request())
        http = asyncio.create_task(over_http(client, LONG))
        await call.read()
        await fleet.until(lambda seen: sum(backend.in_flight for backend in seen.backends) == 2)
        fleet.router.signal(signal.SIGTERM)
        refused = await refusal(stub)
        assert refused == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        with pytest.raises(openai.InternalServerError) as error:
            await over_http(client, Job((3, 4), 1))
        assert (error.value.status_code, error.value.code) == (503, "DRAINING")
        assert await end_of(call) == (grpc.StatusCode.OK, "")
        assert (await http).finish == "length"
    assert await asyncio.to_thread(fleet.router.wait_exit, WAIT_SECONDS) == 0
    assert "outlived the grace" not in fleet.router.log


async def refusal(stub: Any) -> tuple[grpc.StatusCode, str]:
    """Of the first new call that is not taken any more."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            end = await end_of(stub.GenerateStream(Job((3, 4), 1).request()))
            if end[0] is not grpc.StatusCode.OK:
                return end
