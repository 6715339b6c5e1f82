"""What Prometheus can read about admission."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from neo_common.errors import Reason
from router.admission.tickets import Ticket

WAIT_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class AdmissionMetrics:
    """Tenants that the file does not name are `other` together."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._refusals = Counter(
            "neo_router_admission_refusals", "Requests refused with a retry delay, by reason.",
            ["tenant", "reason"], registry=registry,
        )  # fmt: skip
        self._wait = Histogram(
            "neo_router_admission_wait_seconds", "Wait of requests that had to wait.",
            ["priority"], buckets=WAIT_BUCKETS, registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "neo_router_admission_tokens",
            "Prompt and output tokens of ended requests: used where known, else reserved.",
            ["tenant"], registry=registry,
        )  # fmt: skip
        self._waiting = Gauge(
            "neo_router_admission_waiting", "Requests that wait now.", registry=registry
        )

    def watch(self, waiting: Callable[[], int]) -> None:
        self._waiting.set_function(waiting)

    def refused(self, tenant: str, reason: Reason) -> None:
        self._refusals.labels(tenant, reason.value).inc()

    def waited(self, ticket: Ticket) -> None:
        seconds = max(0.0, ticket.started - ticket.arrived)
        self._wait.labels(ticket.rank.name.lower()).observe(seconds)

    def ended(self, tenant: str, ticket: Ticket, used: float | None) -> None:
        if ticket.refusal is None and ticket.started:
            self._tokens.labels(tenant).inc(ticket.cost if used is None else used)
