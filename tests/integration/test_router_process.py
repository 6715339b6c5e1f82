"""`python -m router` as a supervisor sees it: starting, refusing to start, ending."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc.aio
import pytest

from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc
from router.relay import EOF
from tests.support.fake_backend import fake_backends
from tests.support.stack import REPO, free_port


async def start(*flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", *flags, cwd=REPO, stderr=asyncio.subprocess.PIPE
    )


async def said(process: asyncio.subprocess.Process, pattern: str) -> re.Match[str]:
    assert process.stderr is not None
    async with asyncio.timeout(20):
        async for line in process.stderr:
            if found := re.search(pattern, line.decode()):
                return found
    raise AssertionError(f"it ended without {pattern!r}")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("", "backends must name at least one gpu_service"),
        ("backends: [a:1, a:1]", "backends must not name an address twice"),
        ("backend: [a:1]", "unknown setting backend .*did you mean backends"),
        ("backends: [a:1]\nlisten: nowhere", "listen must be HOST:PORT"),
        ("backends: [a:1]\nmax_calls: 0", "max_calls must be at least 1"),
        ("backends: [a:1]\nstale_seconds: 0.1", "stale_seconds must be longer than load_interval"),
        ("backends: [a:1]\nlog_level: loud", "log_level must be one of"),
        ("backends: [a:1]\npolicy: best", "policy must be one of predicted-wait, "),
        ("backends: [a:1]\nmodel_policies: [m]", "model_policies must hold MODEL=POLICY"),
        ("backends: ['dns:///gpu']", "backends: 'dns:///gpu' is not dns:///NAME:PORT"),
        ("backends: ['k8s:///gpu:grpc']", "backends: k8s:/// needs kubernetes_api"),
    ],
)
async def test_it_refuses_to_start_with_one_sentence(
    tmp_path: Path, setting: str, complaint: str
) -> None:
    config = tmp_path / "router.yaml"
    config.write_text(setting)
    process = await start("--config", str(config))
    _, words = await process.communicate()
    assert process.returncode == 2
    lines = words.decode().splitlines()
    assert len(lines) == 1
    assert re.search(complaint, lines[0])


async def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await start("--listen", address, "--backends", "127.0.0.1:1")
        _, words = await process.communicate()
    assert process.returncode == 2
    assert words.decode().splitlines()[-1].startswith(f"router: listen: {address} cannot be bound")


async def test_sigterm_lets_streams_finish_and_metrics_are_served() -> None:
    async with fake_backends(1) as (a,):
        a.hold = asyncio.Event()
        port = free_port()
        process = await start(
            "--listen", "127.0.0.1:0", "--backends", a.address, "--metrics-port", str(port)
        )
        address = (await said(process, r"listening on (\S+),"))[1]
        await said(process, "router: serving")
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.GenerateStream(inference.GenerateRequest(text="hi"))
            first = await call.read()
            page = await asyncio.to_thread(read, f"http://127.0.0.1:{port}/metrics")
            assert f'neo_router_backend_state{{backend="{a.address}",state="up"}} 1.0' in page
            assert f'neo_router_attempts_total{{backend="{a.address}"}} 1.0' in page
            process.send_signal(signal.SIGTERM)
            await said(process, "draining")
            a.hold.set()
            text = first.deltas[0].text
            while (message := await call.read()) is not EOF:  # a busy router joins some
                text += "".join(delta.text for delta in message.deltas)
            assert text == "a0 a1 a2 "
        assert await process.wait() == 0


async def test_backends_are_found_by_name() -> None:
    async with fake_backends(1) as (a,):
        target = f"dns:///localhost:{a.address.rpartition(':')[2]}"
        process = await start("--listen", "127.0.0.1:0", "--backends", target)
        address = (await said(process, r"listening on (\S+),"))[1]
        await said(process, "router: serving")
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            assert (await stub.Generate(inference.GenerateRequest(text="hi"))).model == "a"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


def read(url: str) -> str:
    with urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())
