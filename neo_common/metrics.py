"""A Prometheus registry that belongs to one service, and its HTTP endpoint."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Info, ProcessCollector, start_http_server
from prometheus_client.utils import floatToGoString

from neo_common.version import version


def service_registry(service: str) -> CollectorRegistry:
    """A registry that says which version of which service this is, and what the process uses."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Info("neo_build", "What runs here.", registry=registry)
    build.info({"service": service, "version": version()})
    return registry


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


def cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, int]]:
    """A histogram's buckets as Prometheus wants them. counts: up to each bound, then the rest."""
    named = [*map(floatToGoString, bounds), "+Inf"]
    return list(zip(named, itertools.accumulate(counts), strict=True))
