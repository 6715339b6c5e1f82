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
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from neo_common.grpc.auth import Access, Authenticator
from neo_common.grpc.guard import Guard
from neo_common.grpc.health import LIVENESS, Health
from neo_common.grpc.keepalive import keepalive
from neo_common.grpc.settings import ListenSettings, is_loopback
from neo_common.grpc.tls import TlsFiles, server_credentials

MAX_PORT = 65535
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    # Half-open connections (a client's host gone without a FIN) are found within a minute.
    *keepalive(30.0, 20.0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may look as often while an answer is long in coming: by default the fourth ping within
    # five minutes each ends the connection.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Connections that say nothing: those that a flood leaves take descriptors, of which gRPC would
    # have each keep its own for two minutes.
    ("grpc.server_handshake_timeout_ms", 20_000),
    # A burst that we did not get to yet would otherwise end as CANCELLED, at random from 1000 calls
    # on: what is too much is for us to refuse, with a reason and a delay.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
)


class ServiceServer:
    """One listening server. Use from one event loop.

    services: descriptors of what will be added to `grpc`; health and reflection know them by these.
    counted: which methods (`/package.Service/Method`) a drain waits for and refuses; by default all
    of `services`, so exclude streams that never end by themselves.
    settings: TLS, authentication, limits.
    operators: address and descriptors of what will be added to `admin`; without an address `admin`
    is `grpc`. There, and where only this machine can connect, calls for operators need no
    authentication; see neo_common.grpc.auth.

    Raises ValueError for key files that cannot be used.
    """

    def __init__(
        self,
        listen: str,
        services: Iterable[ServiceDescriptor],
        *,
        counted: Callable[[str], bool] | None = None,
        settings: ListenSettings | None = None,
        operators: tuple[str | None, Iterable[ServiceDescriptor]] = (None, ()),
    ) -> None:
        self._settings = settings or ListenSettings()
        self._listen = listen
        self._admin_listen, for_operators = operators
        self._names = [service.full_name for service in services]
        admin_names = [service.full_name for service in for_operators]
        if self._admin_listen is None:
            self._names += [name for name in admin_names if name not in self._names]
        ours = tuple(f"/{name}/" for name in self._names)
        counted = counted or (lambda method: method.startswith(ours))
        self._authenticator = (
            Authenticator(self._settings) if self._settings.authenticates else None
        )
        self.health = Health(self._names)
        self.access = Access(self._authenticator, private=is_loopback(listen))
        self.guard = Guard(counted, self.access)
        self.grpc = self._server(self.guard, self._names)
        self.admin = self.grpc
        if self._admin_listen is not None:
            access = Access(self._authenticator, private=True)
            self.admin = self._server(Guard(lambda method: False, access), admin_names)
        self._probes: grpc.aio.Server | None = None
        self._stop = asyncio.Event()
        self.address = ""
        self.admin_address = ""
        self.health_address = ""
        """Of `health_listen`; empty without."""

    def _server(self, guard: Guard, names: list[str]) -> grpc.aio.Server:
        options = [*_OPTIONS, *_limits(self._settings)]
        server = grpc.aio.server(interceptors=[guard], options=options)
        self.health.add_to(server)
        reflection.enable_server_reflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
        )
        return server

    async def start(self) -> str:
        """Listen; returns the address with its real port. Raises ValueError when it cannot."""
        files = self._settings.tls
        self.address = self.admin_address = self._bind(self.grpc, self._listen, "listen", files)
        if self._admin_listen is not None:
            self.admin_address = self._bind(self.admin, self._admin_listen, "admin_listen", files)
        if self._settings.health_listen:
            self._probes = grpc.aio.server(options=_OPTIONS)
            self.health.add_to(self._probes)
            self.health_address = self._bind(
                self._probes, self._settings.health_listen, "health_listen", None
            )
        await self.set_serving(False)
        await self.health.set(LIVENESS, True)
        for server in self._servers():
            await server.start()
        return self.address

    def _servers(self) -> set[grpc.aio.Server]:
        return {self.grpc, self.admin} | ({self._probes} if self._probes is not None else set())

    def _bind(
        self, server: grpc.aio.Server, listen: str, setting: str, files: TlsFiles | None
    ) -> str:
        host, _, port = listen.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"{setting} must be HOST:PORT, not {listen!r}")
        if int(port) > MAX_PORT:  # gRPC would take the rest of a division by 65536
            raise ValueError(f"{setting}: the port must be at most {MAX_PORT}, not {port}")
        try:
            if files is None:
                bound = server.add_insecure_port(listen)
            else:
                bound = server.add_secure_port(listen, server_credentials(files))
        except RuntimeError as error:
            raise ValueError(
                f"{setting}: {listen} cannot be bound (is the port in use?); choose another one"
            ) from error
        if bound == 0:
            raise ValueError(f"{setting}: {listen} cannot be bound; choose another port")
        return f"{host}:{bound}"

    async def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 says of readiness; operators may look on any port."""
        await self.health.set_ready(serving)

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
        await self.stop(0.5)
        return finished

    async def stop(self, grace_seconds: float = 0.0) -> None:
        """Close all listeners; calls that are left are cancelled after the grace."""
        await asyncio.gather(*(server.stop(grace_seconds) for server in self._servers()))


def _limits(settings: ListenSettings) -> list[tuple[str, int]]:
    limit = settings.max_message_mib << 20
    options = [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.max_concurrent_streams", settings.max_connection_streams),
    ]
    if settings.max_connection_age_seconds:
        # What runs on an old connection may end there: gRPC's grace for it is infinite.
        age_ms = round(1000 * settings.max_connection_age_seconds)
        options.append(("grpc.max_connection_age_ms", age_ms))
    return options
