"""A Prometheus registry that belongs to one service, and its HTTP endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server


@contextmanager
def endpoint(registry: CollectorRegistry, port: int, address: str = "0.0.0.0") -> Iterator[None]:
    """Serve `registry` at http://address:port/metrics while the context is open; 0 serves nothing.

    Raises ValueError when the port cannot be used."""
    if port == 0:
        yield
        return
    try:
        server, thread = start_http_server(port, addr=address, registry=registry)
    except OverflowError as error:
        raise ValueError(f"metrics_port must be at most 65535, not {port}") from error
    except OSError as error:
        raise ValueError(f"metrics_port {port} cannot be used: {error.strerror}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
