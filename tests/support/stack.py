"""The three real services as child processes on loopback, for tests that need the whole system."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.processes import suspend

REPO = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Service:
    """One child process: its address, how to start it again, and where it logs."""

    name: str
    address: str
    config: dict[str, object]
    directory: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    @property
    def log(self) -> str:
        return "\n".join(
            path.read_text(errors="replace")
            for path in sorted(self.directory.glob(f"{self.name}.*.log"))
        )

    def start(self) -> None:
        assert self.process is None or self.process.poll() is not None
        config_path = self.directory / f"{self.name}.yaml"
        config_path.write_text(yaml.safe_dump(self.config))
        log_path = self.directory / f"{self.name}.{self.starts}.log"
        self.starts += 1
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.name, "--config", str(config_path)],
                cwd=REPO,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_serving(self) -> None:
        """Until grpc.health.v1 says SERVING; fails with the log when the process ends first."""
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    break
                try:
                    answer = stub.Check(
                        health_pb2.HealthCheckRequest(), timeout=1.0, wait_for_ready=True
                    )
                except grpc.RpcError:
                    continue
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                time.sleep(0.05)  # health has no long poll with a time-out in sync grpc
        raise AssertionError(f"{self.name} did not come up:\n{self.log}")

    def signal(self, number: signal.Signals) -> None:
        """Send it; SIGSTOP has taken effect on return."""
        assert self.process is not None
        if number is signal.SIGSTOP:
            suspend(self.process.pid)
        else:
            self.process.send_signal(number)

    def wait_exit(self, seconds: float = 30.0) -> int:
        assert self.process is not None
        return self.process.wait(timeout=seconds)

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=10)
            raise AssertionError(f"{self.name} did not end on SIGTERM:\n{self.log}") from None


@dataclass
class Stack:
    """Router in front of one gpu_service in front of one cpu_service."""

    cpu: Service
    gpu: Service
    router: Service
    services: list[Service] = field(init=False)

    def __post_init__(self) -> None:
        self.services = [self.cpu, self.gpu, self.router]

    @property
    def http(self) -> str:
        """Where OpenAI's clients find the router."""
        return f"http://{self.router.config['http_listen']}/v1"


@contextmanager
def running_stack(
    directory: Path,
    model: str | Path,
    *,
    more: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
    **gpu_config: object,
) -> Iterator[Stack]:
    """Start all three, wait until they serve, stop them at the end; `gpu_config` overrides. `more`:
    further settings by service.

    The runtime directory is short-lived and private, as in a pod's shared emptyDir.
    """
    runtime = directory / "run"
    runtime.mkdir(mode=0o700, exist_ok=True)
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(4)]
    cpu = Service(
        "cpu_service",
        addresses[0],
        directory=directory,
        config={"listen": addresses[0], "runtime_dir": str(runtime), "threads": 1},
    )
    gpu = Service(
        "gpu_service", addresses[1], directory=directory,
        config={
            "listen": addresses[1], "model": str(model), "device": "cpu", "dtype": "float32",
            "threads": 1, "cpu_services": [addresses[0]],
            "host_kv_gib": 0.0625, "gpu_kv_gib": 0.0625,
            # Host rows wherever blocks are short, whatever they cost on this machine.
            "offload_mode": "inline",
            **gpu_config,
        },
    )  # fmt: skip
    router = Service(
        "router",
        addresses[2],
        directory=directory,
        config={
            "listen": addresses[2],
            "backends": [addresses[1]],
            "http_listen": addresses[3],
        },
    )
    stack = Stack(cpu, gpu, router)
    for service in stack.services:
        service.config.update(more.get(service.name, {}))
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        for service in stack.services:
            service.start()
        for service in stack.services:
            service.wait_serving()
        yield stack
    finally:
        errors = []
        for service in reversed(stack.services):
            try:
                service.stop()
            except AssertionError as error:
                errors.append(str(error))
        assert not errors, "\n".join(errors)


def stack_model(directory: Path) -> Path:
    """A tiny Llama that the CPU kernel takes (head_dim 16), with room for long outputs."""
    from tests.support.models import tiny_model_dir

    return tiny_model_dir(directory, "llama", hidden_size=96, max_position_embeddings=4096)
