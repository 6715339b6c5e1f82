"""What Prometheus can read about an HTTP listener."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class HttpMetrics:
    """route: the pattern, not what the client typed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "neo_http_requests", "HTTP requests by route and status sent.", ["route", "status"],
            registry=registry,
        )  # fmt: skip
        self.connections = Gauge(
            "neo_http_connections", "HTTP connections that are open.", registry=registry
        )
        self.refused = Counter(
            "neo_http_refused_connections", "Connections above the limit.", registry=registry
        )
