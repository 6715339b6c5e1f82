"""A Prometheus registry that belongs to one service, and its HTTP endpoint."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Info, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.utils import floatToGoString

from neo_common.pages import Page, serve_pages
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
    routes = {"/metrics": lambda accept: expose(registry, accept)}
    with serve_pages(routes, port, setting="metrics_port", address=address):
        yield


def expose(registry: CollectorRegistry, accept: str) -> Page:
    """The registry's page, as OpenMetrics (which alone has exemplars) where that is accepted.

    Not prometheus_client's own server: its OpenMetrics turns the colon of vLLM's names into an
    underscore."""
    if "application/openmetrics-text" in accept:
        text = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
            registry, escaping=openmetrics.ALLOWUTF8
        )
        return Page("application/openmetrics-text; version=1.0.0; charset=utf-8", text)
    return Page(CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry))


def cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, int]]:
    """A histogram's buckets as Prometheus wants them. counts: up to each bound, then the rest."""
    named = [*map(floatToGoString, bounds), "+Inf"]
    return list(zip(named, itertools.accumulate(counts), strict=True))
