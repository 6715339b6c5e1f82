"""The services as a user would start them, for benchmarks that drive them from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc, types_pb2

START_SECONDS = 300.0


@contextmanager
def stack(model: str, flags: Sequence[str]) -> Iterator[str]:
    """`neo serve` with these flags; yields the router's address. SystemExit, with its log, if it
    does not become ready."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "neo_client.cli", "serve", "--model", model]
    command += ["--listen", address, *flags]
    log_path = Path(tempfile.gettempdir()) / f"neo-serving-{os.getpid()}.log"
    with running(command, log_path) as process:
        _wait_ready(address, process, log_path)
        yield address


@contextmanager
def running(command: Sequence[str], log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes into a file; ended in the end."""
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


async def one_stream(
    stub: inference_pb2_grpc.InferenceServiceStub, prompt: Sequence[int], output: int
) -> tuple[int, int]:
    """Returns (tokens, tokens decoded on the host tier) of a greedy stream."""
    request = inference.GenerateRequest(
        token_ids=types_pb2.TokenIds(ids=prompt),
        sampling=types_pb2.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True),
    )
    tokens, host = 0, 0
    async for message in stub.GenerateStream(request):
        tokens += sum(len(delta.token_ids) for delta in message.deltas)
        host = message.usage.host_tokens or host
    return tokens, host


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_ready(address: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise SystemExit(
                    f"neo serve ended with {process.returncode}:\n{log_path.read_text()}"
                )
            try:
                stub.GetModel(inference.GetModelRequest(), timeout=2, wait_for_ready=True)
                return
            except grpc.RpcError:
                continue
    raise SystemExit(f"neo serve was not ready in {START_SECONDS:.0f} s:\n{log_path.read_text()}")
