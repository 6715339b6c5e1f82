"""A network that breaks, stalls and floods: what clients see, and what servers still hold."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from neo_common.errors import ErrorDetails
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc
from tests.support.fake_backend import FakeBackend, fake_backends
from tests.support.front import front, rest
from tests.support.load import Job, assert_idle_and_whole, run_job, watch_load
from tests.support.stack import Service, free_port, running_stack, stack_model
from tests.support.wire import wire

HELLO = inference.GenerateRequest(text="hi")
LOCAL = (("grpc.use_local_subchannel_pool", 1),)
MESSAGE_BYTES = 16 << 10
MESSAGES = 1000


def stub_of(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel)


async def text_of(call: Any) -> str:
    return "".join([delta.text for message in await rest(call) for delta in message.deltas])


async def test_a_reset_from_the_client_ends_its_calls_alone() -> None:
    async with fake_backends(1) as (backend,), front([backend]) as ready:
        backend.hold = asyncio.Event()
        async with (
            wire(ready.router.server.address) as between,
            grpc.aio.insecure_channel(between.address, options=LOCAL) as channel,
        ):
            calls = [stub_of(channel).GenerateStream(HELLO) for _ in range(8)]
            other = ready.inference.GenerateStream(HELLO)
            for call in (*calls, other):
                await call.read()
            between.reset()
            await until(lambda: backend.live == 1)
            backend.hold.set()
            assert await text_of(other) == "a1 a2 "
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call.read()
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_reset_from_a_backend_ends_its_streams_and_no_other() -> None:
    """New calls find it again at once: it is the connection that broke."""
    async with fake_backends(2) as (lost, whole), wire(lost.address) as between:
        hold = lost.hold = whole.hold = asyncio.Event()
        backends: Any = [SimpleNamespace(address=between.address), whole]
        async with front(backends, policy="round-robin") as ready:
            calls = [ready.inference.GenerateStream(HELLO) for _ in range(8)]
            for call in calls:
                await call.read()
            assert lost.live == whole.live == 4
            between.reset()
            await until(lambda: lost.live == 0)
            hold.set()
            ends = [await end_of(call) for call in calls]
            assert sorted(ends) == ["BACKEND_LOST"] * 4 + ["b1 b2 "] * 4
            texts = [await text_of(ready.inference.GenerateStream(HELLO)) for _ in range(2)]
            async with asyncio.timeout(30):
                while texts[-1] != "a0 a1 a2 ":
                    texts.append(await text_of(ready.inference.GenerateStream(HELLO)))
            assert set(texts) <= {"a0 a1 a2 ", "b0 b1 b2 "}


async def end_of(call: Any) -> str:
    try:
        return await text_of(call)
    except grpc.aio.AioRpcError as error:
        return ErrorDetails(error).reason


async def until(holds: Any, seconds: float = 30.0) -> None:
    """What no event tells."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_slow_link_delays_and_changes_nothing() -> None:
    """40 ms each way on both hops: a message is not lost, and calls do not queue behind others."""
    async with fake_backends(1, tokens=20) as (backend,), wire(backend.address) as behind:
        behind.delay = 0.04
        backends: Any = [SimpleNamespace(address=behind.address)]
        async with (
            front(backends, stale_seconds=5.0, silence_seconds=10.0) as ready,
            wire(ready.router.server.address) as before,
            grpc.aio.insecure_channel(before.address, options=LOCAL) as channel,
        ):
            before.delay = 0.04
            calls = [stub_of(channel).GenerateStream(HELLO) for _ in range(50)]
            texts = await asyncio.gather(*(text_of(call) for call in calls))
            assert set(texts) == {"".join(f"a{number} " for number in range(20))}


@pytest.fixture(scope="module")
def router_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A router process with an engine without a model behind it."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "benchmarks.router.engine", "--listen", address]
    engine = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2])
    listen = f"127.0.0.1:{free_port()}"
    config: dict[str, object] = {"listen": listen, "backends": [address]}
    router = Service("router", listen, config, tmp_path_factory.mktemp("router"))
    try:
        router.start()
        router.wait_serving()
        yield router
    finally:
        router.stop()
        engine.kill()
        engine.wait(timeout=30)


def asked(tokens: int) -> inference.GenerateRequest:
    request = inference.GenerateRequest(text="hi")
    request.sampling.max_tokens = tokens
    return request


class Chatty(FakeBackend):
    """Sends as fast as it is let, and knows how much that was."""

    sent = 0

    async def GenerateStream(self, request: Any, context: Any) -> Any:
        for number in range(MESSAGES if request.text == "all" else 3):
            delta = inference.Choice(text=f"{number} ".ljust(MESSAGE_BYTES))
            yield inference.GenerateStreamResponse(deltas=[delta])
            self.sent += 1


async def test_slow_readers_hold_little_and_hold_up_nobody() -> None:
    """What a client does not read stays at the engine, which merges it; all of it comes later."""
    backend = Chatty("a")
    await backend.start()
    window = ("grpc.http2.bdp_probe", 0)
    async with (
        front([backend]) as ready,
        grpc.aio.insecure_channel(ready.router.server.address, options=(*LOCAL, window)) as channel,
    ):
        all_of_it = inference.GenerateRequest(text="all")
        calls = [stub_of(channel).GenerateStream(all_of_it) for _ in range(8)]
        quick, seen = 0, -1
        while seen != (seen := backend.sent - quick):
            for _ in range(20):
                quick += len(await rest(ready.inference.GenerateStream(HELLO)))
        # Windows and buffers of both hops: 320 KiB and a few messages.
        assert seen * MESSAGE_BYTES < 8 * (640 << 10)
        assert len(await rest(calls.pop())) == MESSAGES
        for call in calls:
            call.cancel()
    await backend.stop()


async def flood(address: str, seconds: float, rate: int) -> list[socket.socket]:
    """`rate` connections a second, in equal parts: closed at once, reset, given garbage, given
    nothing. Returns those that are open still."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    left: list[socket.socket] = []

    async def one(number: int) -> None:
        opened = socket.socket()
        opened.setblocking(False)
        await loop.sock_connect(opened, (host, int(port)))
        kind = number % 4
        if kind == 2:
            await loop.sock_sendall(opened, b"\x16\x03\x01GET / nothing\r\n\r\n" * 4)
        if kind >= 2:
            left.append(opened)
            return
        if kind == 1:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        opened.close()

    began = time.monotonic()
    tasks = []
    for number in range(round(seconds * rate)):
        await asyncio.sleep(began + number / rate - time.monotonic())
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    return left


async def test_a_storm_of_connections_passes(router_alone: Service) -> None:
    """1,000 a second: calls on connections that were there go on, and nothing is left of it."""
    assert router_alone.process is not None
    router = psutil.Process(router_alone.process.pid)
    async with grpc.aio.insecure_channel(router_alone.address, options=LOCAL) as channel:
        await text_of(stub_of(channel).GenerateStream(asked(10)))
        before = router.num_fds()
        storm = asyncio.create_task(flood(router_alone.address, 3.0, 1000))
        calls = 0
        while not storm.done():
            text = await text_of(stub_of(channel).GenerateStream(asked(10)))
            assert len(text.split()) == 10
            calls += 1
        left = await storm
        assert calls > 3
        for connection in left:
            connection.close()
        await until(lambda: router.num_fds() <= before + 2, 60)
        async with grpc.aio.insecure_channel(router_alone.address, options=LOCAL) as new:
            assert len((await text_of(stub_of(new).GenerateStream(asked(10)))).split()) == 10


@pytest.mark.slow
async def test_connections_that_say_nothing_are_closed(router_alone: Service) -> None:
    host, _, port = router_alone.address.rpartition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(50)]
    async with asyncio.timeout(60):
        for reader, writer in silent:
            while await reader.read(1 << 16):  # its own greeting
                pass
            writer.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_peers_that_vanish_are_found_in_the_documented_time(tmp_path: Path) -> None:
    """A client's connection stalls: its request ends, its blocks are free. Then a gpu_service's."""
    model = stack_model(tmp_path / "model")
    endless = Job(prompt=tuple(range(3, 40)), output_tokens=4000)
    async with contextlib.AsyncExitStack() as stack:
        found = stack.enter_context(running_stack(tmp_path, model, max_context_tokens=4096))
        gpu = found.gpu.address
        behind = await stack.enter_async_context(wire(gpu))
        listen = f"127.0.0.1:{free_port()}"
        (tmp_path / "router").mkdir()
        config: dict[str, object] = {"listen": listen, "backends": [behind.address]}
        router = Service("router", listen, config, tmp_path / "router")
        router.start()
        stack.callback(router.stop)
        await asyncio.to_thread(router.wait_serving)
        before = await stack.enter_async_context(wire(router.address))
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(before.address, options=LOCAL)
        )
        queued = [stub_of(channel).GenerateStream(endless.request()) for _ in range(2)]
        for call in queued:
            await call.read()
        before.stall()
        began = time.monotonic()
        async for load in watch_load(gpu, interval_ms=50, seconds=200):
            if not load.gpu.running_requests + load.host.running_requests:
                break
        assert time.monotonic() - began < 60
        await assert_idle_and_whole(gpu)
        before.go_on()

        short = Job(prompt=(3, 4), output_tokens=4)
        assert (await run_job(router.address, short)).error is None
        stuck = asyncio.create_task(run_job(router.address, endless))
        async for load in watch_load(gpu, interval_ms=50, seconds=60):
            if load.gpu.running_requests + load.host.running_requests:
                break
        behind.stall()
        began = time.monotonic()
        assert (await stuck).error is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - began < 30
