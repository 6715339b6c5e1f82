"""A grpc.aio server as every service of ours runs it: health, reflection, errors, drain.

server = ServiceServer("127.0.0.1:7001", [inference_pb2.DESCRIPTOR.services_by_name[...]])
add_InferenceServiceServicer_to_server(servicer, server.grpc)
await server.start()                       NOT_SERVING until:
await server.set_serving(True)
await server.wait_for_stop_signal()        SIGTERM or SIGINT
await server.drain(grace_seconds)          NOT_SERVING, new calls refused, live ones finish
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterable

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from neo_common.grpc.guard import Guard

MAX_MESSAGE_BYTES = 64 << 20
MAX_PORT = 65535
# Half-open connections (a client's host gone without a FIN) are found within a minute.
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


class ServiceServer:
    """One listening server. Use from one event loop.

    services: descriptors of what will be added; health and reflection know them by these.
    counted: which methods (`/package.Service/Method`) a drain waits for and refuses; by default all
    of `services`, so exclude streams that never end by themselves.
    """

    def __init__(
        self,
        listen: str,
        services: Iterable[ServiceDescriptor],
        *,
        counted: Callable[[str], bool] | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._listen = listen
        self._names = [service.full_name for service in services]
        ours = tuple(f"/{name}/" for name in self._names)
        self.guard = Guard(counted or (lambda method: method.startswith(ours)))
        limits = (
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        )
        self.grpc = grpc.aio.server(interceptors=[self.guard], options=[*_OPTIONS, *limits])
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(
            [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self.grpc
        )
        self._stop = asyncio.Event()
        self.address = ""

    async def start(self) -> str:
        """Listen; returns the address with its real port. Raises ValueError when it cannot."""
        host, _, port = self._listen.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"listen must be HOST:PORT, not {self._listen!r}")
        if int(port) > MAX_PORT:  # gRPC would take the rest of a division by 65536
            raise ValueError(f"listen: the port must be at most {MAX_PORT}, not {port}")
        try:
            bound = self.grpc.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise ValueError(
                f"listen: {self._listen} cannot be bound (is the port in use?); choose another one"
            ) from error
        if bound == 0:
            raise ValueError(f"listen: {self._listen} cannot be bound; choose another port")
        await self.set_serving(False)
        await self.grpc.start()
        self.address = f"{host}:{bound}"
        return self.address

    async def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 says, for "" and for each service."""
        status = health_pb2.HealthCheckResponse.NOT_SERVING
        if serving:
            status = health_pb2.HealthCheckResponse.SERVING
        for name in ["", *self._names]:
            await self._health.set(name, status)

    def stop_soon(self) -> None:
        """What a signal does."""
        self._stop.set()

    async def wait_for_stop_signal(self) -> None:
        """Until SIGTERM, SIGINT or `stop_soon`."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._stop.set)
        await self._stop.wait()

    def begin_drain(self) -> None:
        """Refuse new counted calls from now on; those live go on."""
        self.guard.draining = True

    async def drain(self, grace_seconds: float) -> bool:
        """Let live counted calls finish within the grace, then stop. True when all did."""
        await self.set_serving(False)
        self.begin_drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.guard.idle.wait(), grace_seconds)
        finished = self.guard.idle.is_set()
        # The last answers are still on their way out; calls that are left are cancelled.
        await self.grpc.stop(0.5)
        return finished
