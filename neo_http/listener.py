"""Listens for HTTP on behalf of a service.

listener = HttpListener(Parts(...), tls)
await listener.start()          after the gRPC server
...                             the service drains: requests are refused, live ones finish
await listener.stop()           connections are closed
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from aiohttp import web

from neo_common.grpc.server import MAX_PORT
from neo_common.grpc.tls import TlsFiles
from neo_http.app import Api, Parts
from neo_http.errors import Problem
from neo_http.tls import server_context

BACKLOG = 1024
HEADER_BYTES = 16384
# A client's host gone without a FIN is found within a minute, as on the gRPC side.
_WHEN_GONE = {
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 60_000,
}


class HttpListener:
    """Used by one event loop. max_age_seconds: connections older than this, give or take a tenth,
    are closed once their request has ended; 0: never. Raises ValueError for key files that cannot
    be used."""

    def __init__(self, parts: Parts, tls: TlsFiles | None, max_age_seconds: float = 0.0) -> None:
        self._max_age_seconds = max_age_seconds
        self._seen_at: dict[Any, float] = {}
        """Connections at the last look, and when each was first seen."""
        self._next_look: asyncio.TimerHandle | None = None
        self._settings = parts.settings
        self._metrics = parts.metrics
        self._tls = None if tls is None else server_context(tls)
        self._api = Api(parts)
        self._runner = web.AppRunner(
            self._api.application(),
            handle_signals=False,
            # A client that hangs up cancels its handler, and so the backend's call.
            handler_cancellation=True,
            access_log=None,
            # All that aiohttp itself would say is that somebody sent bytes that are no HTTP.
            logger=logging.Logger("neo_http.wire", logging.CRITICAL),
            keepalive_timeout=parts.settings.http_idle_seconds,
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
            auto_decompress=False,
            # How long what is left of a refused body is read, so that the refusal is, too.
            lingering_time=2.0,
            shutdown_timeout=1.0,
        )
        self._server: asyncio.Server | None = None
        self.address = ""

    async def start(self) -> str:
        """Listen; returns the address with its real port. Raises ValueError when it cannot."""
        listening = _bound(self._settings.http_listen)
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        self._metrics.connections.set_function(lambda: len(server.connections))
        self._server = await asyncio.get_running_loop().create_server(
            self._protocol, sock=listening, ssl=self._tls, backlog=BACKLOG
        )
        if self._max_age_seconds:
            self._close_old(server)
        host = self._settings.http_listen.rpartition(":")[0]
        self.address = f"{host}:{listening.getsockname()[1]}"
        return self.address

    def _close_old(self, server: web.Server) -> None:
        """So that clients spread out again over servers that came later. One timer for all: a
        timer for each would keep connections in memory that have ended long ago."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._seen_at = {each: self._seen_at.get(each, now) for each in server.connections}
        for connection, seen_at in self._seen_at.items():
            if now - seen_at < self._max_age_seconds:
                continue
            if connection in self._api.busy:
                connection.close()  # when its request has ended
            else:
                connection.force_close()
        self._next_look = loop.call_later(self._max_age_seconds / 10, self._close_old, server)

    def _protocol(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= self._settings.http_max_connections:
            self._metrics.refused.inc()
            return _Full()
        return server()

    async def stop(self) -> None:
        """Close everything; what is still running is cancelled."""
        if self._next_look is not None:
            self._next_look.cancel()
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()


class _Full(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: Any) -> None:
        problem = Problem(503, "too many connections", "OVERLOADED", retry_after=1.0)
        body = web.json_response(problem.body()).body
        assert isinstance(body, bytes)
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Retry-After: 1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        transport.write(head.encode() + body)
        transport.close()


def _bound(listen: str) -> socket.socket:
    """Raises ValueError."""
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit():
        raise ValueError(f"http_listen must be HOST:PORT, not {listen!r}")
    if int(port) > MAX_PORT:
        raise ValueError(f"http_listen: the port must be at most {MAX_PORT}, not {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(
            f"http_listen: {listen} cannot be bound (is the port in use?); choose another one"
        ) from error
    # Accepted sockets inherit them.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _WHEN_GONE.items():
        if (option := getattr(socket, name, None)) is not None:
            bound.setsockopt(socket.IPPROTO_TCP, option, value)
    return bound
