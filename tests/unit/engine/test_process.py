"""The engine core as a process, behind the client that the front end uses."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
import zmq

from gpu_service.engine import channel, core_process
from gpu_service.engine.build import build_core, resolve_device
from gpu_service.engine.client import EngineClient, EngineStartError
from gpu_service.engine.messages import Abort, Failed, Output, Progress, Ready, Shutdown
from tests.support.engine import config, greedy
from tests.support.models import greedy_tokens, reference_model, tiny_model_dir
from tests.support.offload import cpu_seconds


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", head_dim=16)


@pytest.fixture
async def client(directory: Path) -> AsyncIterator[EngineClient]:
    made = EngineClient(config(directory))
    await made.start()
    yield made
    await made.stop(grace_seconds=5)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What tempfile uses; pytest's own folder may be too long a path for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


def test_the_client_imports_no_torch() -> None:
    code = "import sys, gpu_service.engine.client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_start_says_what_it_does_and_what_it_offers(directory: Path) -> None:
    heard: list[Progress] = []
    made = EngineClient(config(directory, max_context_tokens=200))
    try:
        ready = await made.start(heard.append)
        assert isinstance(ready, Ready)
        assert ready.max_context_tokens == 200
        assert (ready.gpu_blocks, ready.host_blocks, ready.block_tokens) == (96, 0, 16)
        assert heard[-1].done_bytes == heard[-1].total_bytes > 0
        assert made._directory is not None
        assert made._directory.stat().st_mode & 0o777 == 0o700
        place = made._directory
    finally:
        await made.stop()
    assert not place.exists()


async def test_tokens_come_out(client: EngineClient, directory: Path) -> None:
    prompt = list(range(3, 40))
    await client.send(greedy("a", prompt, 12))
    await client.send(greedy("b", prompt, 500))
    await client.send(Abort("b"))
    tokens: list[int] = []
    async for event in client:
        assert isinstance(event, Output)
        tokens += [t for d in event.deltas if d.request_id == "a" for t in d.token_ids]
        if event.usages:
            break
    assert tokens == greedy_tokens(reference_model(directory), prompt, 12)


async def test_an_idle_core_uses_no_cpu(client: EngineClient) -> None:
    await client.send(greedy("a", [5, 6, 7], 3))
    async for event in client:
        if isinstance(event, Output) and event.usages:
            break
    assert client.pid is not None
    await asyncio.sleep(0.2)
    before = cpu_seconds(client.pid)
    await asyncio.sleep(1.0)
    assert cpu_seconds(client.pid) - before <= 0.02


async def test_death_is_an_event(client: EngineClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    events = [event async for event in client if not isinstance(event, Output)]
    assert len(events) == 1
    assert isinstance(events[0], Failed)
    assert "signal 9" in events[0].message


async def test_telling_a_dead_core_something_does_not_wait(client: EngineClient) -> None:
    """Its socket has nobody at the other end, which a queue would wait for."""
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        for _ in range(3):  # before the end is known, and after
            await client.send(greedy("a", [3, 4], 12))
        *_, last = [event async for event in client]
        assert isinstance(last, Failed)
        await client.send(Shutdown())


@pytest.mark.parametrize("how", ["shutdown", "sigterm"])
async def test_live_requests_finish_before_the_core_ends(client: EngineClient, how: str) -> None:
    await client.send(greedy("a", [5, 6, 7], 60))
    async for event in client:
        if isinstance(event, Output) and event.deltas:
            break
    if how == "shutdown":
        await client.send(Shutdown())
    else:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGINT)  # for the front end, not for the core
        os.kill(client.pid, signal.SIGTERM)
    finished = False
    async for event in client:
        assert isinstance(event, Output)
        finished = finished or bool(event.usages)
    assert finished, "the stream ended before the request"


async def test_a_killed_front_end_leaves_no_core_and_no_folder(
    directory: Path, temporary: Path
) -> None:
    """The core ends at once; the folder goes when the next front end makes its own."""
    code = """
import asyncio, os, signal, sys
import msgspec
from gpu_service.config import GpuServiceConfig
from gpu_service.engine.client import EngineClient
async def main():
    client = EngineClient(msgspec.json.decode(sys.argv[1], type=GpuServiceConfig))
    await client.start()
    print(client.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    argument = msgspec.json.encode(config(directory)).decode()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, argument, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    out, _ = await process.communicate()
    pid, end = int(out), time.monotonic() + 5
    while _lives(pid):
        assert time.monotonic() < end, "the core outlives its front end"
        await asyncio.sleep(0.02)
    assert len(os.listdir(temporary)) == 1
    made = channel.make_directory()
    assert os.listdir(temporary) == [made.name]


def test_folders_of_those_who_live_stay(temporary: Path) -> None:
    """One that has bound its sockets, one that is about to; and nobody hears of the look."""
    about_to, bound = channel.make_directory(), channel.make_directory()
    with zmq.Context() as context, context.socket(zmq.PUSH) as commands:
        commands.linger = 0
        accepted = commands.get_monitor_socket(zmq.EVENT_ACCEPTED)
        commands.bind(channel.commands_address(bound))
        made = channel.make_directory()
        assert set(temporary.iterdir()) == {about_to, bound, made}
        with context.socket(zmq.PULL) as core:
            core.connect(channel.commands_address(bound))
            commands.send(b"still here")
            assert core.recv() == b"still here"
        accepted.recv_multipart()
        assert not accepted.poll(0), "somebody else has connected"
        commands.disable_monitor()


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "/nowhere/model"}, "nowhere"),
        ({"model": ""}, "model must be given"),
        ({"device": "quantum"}, "device must be"),
        ({"device": "cuda:7"}, "no CUDA device"),
        ({"block_tokens": 8}, "block_tokens must be"),
        ({"max_context_tokens": 100_000}, "max_context_tokens"),
        ({"offload": "always"}, "cpu_services"),
        ({"offload": "sometimes"}, "offload must be"),
        ({"gpu_kv_blocks": 0, "gpu_kv_gib": 1e-7}, "gpu_kv_gib"),
        ({"gpu_kv_blocks": 1 << 40}, "gpu_kv_blocks"),
        ({"max_batch_tokens": -1}, "max_batch_tokens"),
        ({"dtype": "float8"}, "dtype"),
    ],
)
def test_what_cannot_start_says_why_in_a_sentence(
    directory: Path, changes: dict[str, object], sentence: str
) -> None:
    values = {"model": directory, **changes}
    with pytest.raises(ValueError, match=sentence) as caught:
        build_core(config(values.pop("model"), **values))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="'cuda:2', but torch sees 2 CUDA devices"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_device_too_small_says_so_in_a_sentence(
    directory: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []

    def build(*_: object) -> None:
        raise error

    monkeypatch.setattr(core_process, "build_core", build)
    sender = SimpleNamespace(send=said.append)
    assert core_process._run(config(directory), sender, print) == 2  # type: ignore[arg-type]
    (failed,) = said
    assert isinstance(failed, Failed)
    assert failed.message.startswith("memory ran out while the model was loading; lower")


async def test_the_client_raises_what_the_core_says_and_cleans_up() -> None:
    made = EngineClient(config("/nowhere/model"))
    with pytest.raises(EngineStartError, match="nowhere"):
        await made.start()
    assert made._directory is not None
    assert not made._directory.exists()
    assert made.pid is None or not _lives(made.pid)


async def test_stopping_while_somebody_listens_ends_the_stream(client: EngineClient) -> None:
    await client.send(greedy("a", [5, 6, 7], 30))

    async def listen() -> bool:
        usages = [e.usages async for event in client if isinstance(e := event, Output)]
        return any(usages)

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0)
    await client.stop(grace_seconds=20)
    assert await asyncio.wait_for(listener, 10)
