"""What a kubelet would run of a GPU pod and a router, as processes here: the manifests' commands,
arguments and environments, with other ports and folders."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.manifests import Container, Manifest, containers
from tests.support.stack import REPO, free_port

MODULES = {"router": "router", "cpu-service": "cpu_service", "gpu-service": "gpu_service"}
SERVING = health_pb2.HealthCheckResponse.SERVING


class Pod:
    """One process per container; `stop` them in any case."""

    def __init__(self, manifests: Sequence[Manifest], root: Path) -> None:
        self._containers = {c.name: c for c in containers(manifests)}
        self._root = root
        self._overrides: dict[str, dict[str, str]] = {}
        self._ports: dict[str, int] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for container in self._containers.values():
            for mount in container.spec["volumeMounts"]:
                (root / mount["mountPath"].lstrip("/")).mkdir(parents=True, exist_ok=True)

    def override(self, name: str, variables: dict[str, str]) -> None:
        """What a cluster has and this machine has not."""
        self._overrides[name] = variables

    def port(self, name: str) -> int:
        """Here, of the manifests' port `name`; one here for each there."""
        return self._ports.setdefault(name, free_port())

    def here(self, text: str) -> str:
        """With this machine's ports and folders."""
        text = re.sub(
            r"^(0\.0\.0\.0|127\.0\.0\.1):(\d+)$",
            lambda match: f"127.0.0.1:{self.port(match[2])}",
            text,
        )
        return re.sub(r"(?<=^)(/run/neo|/tmp|/cache)(?=/|$)", rf"{self._root}\1", text)

    def environment(self, container: Container) -> dict[str, str]:
        ours = {name: self.here(value) for name, value in container.environment.items()}
        for name in ours:
            if name.endswith("_PORT"):
                ours[name] = str(self.port(ours[name]))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NEO_")}
        return {**kept, **ours, **self._overrides.get(container.name, {})}

    def start(self, name: str) -> subprocess.Popen[bytes]:
        container = self._containers[name]
        arguments = []
        for argument in container.spec.get("args", ()):
            flag, equals, value = argument.partition("=")
            arguments.append(flag + equals + self.here(value))
        command = ["-m", MODULES[name]] if name in MODULES else ["-m", "neo_client.cli", "doctor"]
        with (self._root / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *command, *arguments],
                cwd=REPO, env=self.environment(container), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self._processes[name]

    def log(self, name: str) -> str:
        return (self._root / f"{name}.log").read_text(errors="replace")

    def probe(self, name: str, probe: str) -> grpc.Channel:
        """The port that a kubelet would ask."""
        asked = self._containers[name].spec[probe]["grpc"]
        return grpc.insecure_channel(f"127.0.0.1:{self.port(str(asked['port']))}")

    def wait(self, name: str, probe: str, serving: bool = True, service: str | None = None) -> None:
        """Until the probe (or the health of another `service`) says so."""
        process = self._processes[name]
        asked = self._containers[name].spec[probe]["grpc"]["service"]
        request = health_pb2.HealthCheckRequest(service=asked if service is None else service)
        with self.probe(name, probe) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for answer in stub.Watch(request, timeout=120, wait_for_ready=True):
                if (answer.status == SERVING) is serving:
                    return
                assert process.poll() is None, self.log(name)

    def stop(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
