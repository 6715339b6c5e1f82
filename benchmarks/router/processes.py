"""The processes of one run: started, pinned, waited for, looked at, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.stack import free_port
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc

READY_SECONDS = 60.0
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cpus:
    """router: the one that it is pinned to. others: where everything else runs."""

    router: int
    others: frozenset[int]

    @classmethod
    def split(cls) -> Cpus:
        """The last allowed CPU for the router; with one CPU, all share it."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[-1], frozenset(allowed[:-1] or allowed))


@dataclass(frozen=True)
class Process:
    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def resident_mib(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@contextmanager
def started(module: str, flags: Sequence[str], cpus: frozenset[int]) -> Iterator[Process]:
    """`python -m module --listen ADDRESS ...`; SystemExit with what it said if it ends at once."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", module, "--listen", address, *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        os.sched_setaffinity(process.pid, cpus)  # before it has threads of its own
        try:
            yield Process(address, process.pid)
        finally:
            ended = process.poll()
            process.kill()
            process.wait(timeout=30)
            if ended not in (None, -signal.SIGKILL):
                log.seek(0)
                raise SystemExit(f"{module} ended with {ended}:\n{log.read()}")


@contextmanager
def engines(count: int, flags: Sequence[str], cpus: Cpus) -> Iterator[list[Process]]:
    with ExitStack() as stack:
        found = [
            stack.enter_context(started("benchmarks.router.engine", flags, cpus.others))
            for _ in range(count)
        ]
        for engine in found:
            wait_ready(engine.address)
        yield found


@contextmanager
def router(backends: Sequence[Process], flags: Sequence[str], cpus: Cpus) -> Iterator[Process]:
    addresses = ",".join(backend.address for backend in backends)
    every = ["--backends", addresses, "--log-level", "warning", *flags]
    with started("router", every, frozenset({cpus.router})) as process:
        wait_ready(process.address)
        yield process


@contextmanager
def proxy(backend: Process, cpus: Cpus) -> Iterator[Process]:
    flags = ["--backend", backend.address]
    with started("benchmarks.router.proxy", flags, frozenset({cpus.router})) as process:
        wait_ready(process.address)
        yield process


@contextmanager
def client(server: Process, flags: Sequence[str], cpus: Cpus) -> Iterator[None]:
    """Streams of a process of its own, so that reading them takes no time from who measures."""
    with started("benchmarks.router.load", ["--address", server.address, *flags], cpus.others):
        yield


def wait_ready(address: str) -> None:
    """Until it answers, which includes what is behind it."""
    deadline = time.monotonic() + READY_SECONDS
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        while True:
            try:
                stub.GetModel(inference.GetModelRequest(), timeout=1, wait_for_ready=True)
                return
            except grpc.RpcError as error:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{address} did not become ready: {error}") from None
                time.sleep(0.05)
