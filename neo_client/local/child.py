"""One service as a child process: start, readiness by health check, its output, its end."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from neo_common.config import ENVIRONMENT_PREFIX

KERNEL_ISA = "NEO_CPU_ISA"
"""Forces the attention kernel's instruction set; not a setting of a service."""
LAST_LINES = 15
MAX_LINE_BYTES = 1 << 16

Say = Callable[[str, str], None]
"""`say(service, line)`: takes each line that a service prints."""


@dataclass(frozen=True)
class Service:
    """What to start: `python -m MODULE --config FILE` with these settings."""

    module: str
    address: str
    settings: dict[str, Any] = field(default_factory=dict)


class ChildFailed(Exception):
    """A service ended that should not have; the message says which and how."""


class Child:
    """A running service. Use from one event loop; `stop` it in any case."""

    def __init__(self, service: Service, process: asyncio.subprocess.Process, say: Say) -> None:
        self.service = service
        self.ready = False
        self._process = process
        self._say = say
        self._tail: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._reader = asyncio.create_task(self._read(), name=f"read {service.module}")

    @classmethod
    async def start(cls, service: Service, directory: Path, say: Say) -> Child:
        """Its settings are written to `directory`, which only the user can read."""
        config = directory / f"{service.module}.yaml"
        config.write_text(yaml.safe_dump({"listen": service.address, **service.settings}))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "neo_client.local.launch", str(os.getpid()),
            service.module, "--config", str(config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=MAX_LINE_BYTES,
            env=environment(),
            # Ctrl-C in the terminal reaches this process alone, which stops its children in order.
            start_new_session=True,
        )  # fmt: skip
        return cls(service, process, say)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                raw = await self._process.stdout.readline()
            except ValueError:  # a line beyond the limit; what was read of it is dropped
                continue
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip()
            self._tail.append(line)
            self._say(self.service.module, line)

    async def ended(self) -> int:
        """Its exit code, negative for a signal, once it has ended and all its output is read."""
        code = await self._process.wait()
        # A grandchild may hold the pipe a little longer than the service itself lived.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reader), 1.0)
        return code

    async def wait_ready(self) -> None:
        """Until it serves, by its own word. Raises ChildFailed when it ends before."""
        end = asyncio.create_task(self.ended())
        health = asyncio.create_task(until_serving(self.service.address))
        try:
            await asyncio.wait({end, health}, return_when=asyncio.FIRST_COMPLETED)
            if not health.done():
                raise ChildFailed(self.describe_end(end.result()))
            health.result()
            self.ready = True
        finally:
            for task in (end, health):
                task.cancel()
            await asyncio.gather(end, health, return_exceptions=True)

    def describe_end(self, code: int) -> str:
        """How it ended, with its last words."""
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        words = "\n".join(f"  {line}" for line in self._tail)
        return f"{self.service.module} ended with {how}" + (f":\n{words}" if words else "")

    async def stop(self, grace_seconds: float) -> int:
        """SIGTERM, then SIGKILL after the grace; returns the exit code."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                return await asyncio.wait_for(self.ended(), grace_seconds)
            except TimeoutError:
                self.kill()
        return await self.ended()

    def kill(self) -> None:
        """Now."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def environment() -> dict[str, str]:
    """Ours, less the settings in it: NEO_LISTEN cannot be meant for all three services."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ENVIRONMENT_PREFIX) or name == KERNEL_ISA
    }
    # gRPC's own words at INFO (a GOAWAY at each stop) are not for people.
    return {"GRPC_VERBOSITY": "ERROR", **kept}


async def until_serving(address: str) -> None:
    """Until grpc.health.v1 at `address` says SERVING; waits as long as that takes."""
    options = (("grpc.max_reconnect_backoff_ms", 200), ("grpc.initial_reconnect_backoff_ms", 50))
    while True:
        # A channel of its own for each try: one that met a closed port backs off for long.
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            call = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for answer in call:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
        await asyncio.sleep(0.05)  # the server ended the watch or cut the connection
