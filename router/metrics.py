"""What Prometheus can read about the router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from neo_common.errors import ServiceError
from neo_common.tracing import NO_TRACES, Span, Tracer
from router.backend import Backend
from router.status.recent import RecentCalls
from router.views import BackendState

FIRST_MESSAGE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Measured:
    """One call as it goes; `code` is the status that it ends with."""

    def __init__(self, metrics: RouterMetrics, method: str, span: Span) -> None:
        self.code = "OK"
        self._span = span
        self._metrics = metrics
        self._method = method
        self._started = metrics.clock()
        self._attempts = 0
        self._answered = False
        metrics.recent.started()

    def attempt(self, backend: str) -> None:
        """The call goes to `backend`."""
        self._metrics.attempts.labels(backend).inc()
        self._span.event("attempt", backend=backend)
        if self._attempts:
            self._metrics.retries.inc()
        self._attempts += 1

    def hedge(self, backend: str) -> None:
        """The call goes to `backend`, too."""
        self._metrics.attempts.labels(backend).inc()
        self._metrics.hedges.inc()

    def message(self) -> None:
        """A message of the answer came."""
        if not self._answered:
            self._answered = True
            waited = self._metrics.clock() - self._started
            exemplar = {"trace_id": self._span.trace_id} if self._span.recording else None
            self._metrics.first_message.labels(self._method).observe(waited, exemplar)
            self._metrics.recent.first_message(waited)
        self._metrics.messages.inc()
        self._metrics.recent.message()


class RouterMetrics:
    """Counts and times of one router, in `registry`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer = NO_TRACES,
    ) -> None:
        self.clock = clock
        self._tracer = tracer
        self.recent = RecentCalls()
        self._shown: set[str] = set()
        self.calls = Counter(
            "neo_router_calls", "Calls by method and final status.", ["method", "code"],
            registry=registry,
        )  # fmt: skip
        self.attempts = Counter(
            "neo_router_attempts", "Calls sent to each backend.", ["backend"], registry=registry
        )
        self.retries = Counter(
            "neo_router_retries", "Attempts after the first of a call.", registry=registry
        )
        self.over_budget = Counter(
            "neo_router_retries_over_budget", "Retries that the budget did not allow.",
            registry=registry,
        )  # fmt: skip
        self.choices = Counter(
            "neo_router_choices",
            "Backends chosen, and whether a prompt went where its beginning was last.",
            ["policy", "how"], registry=registry,
        )  # fmt: skip
        self.predicted_wait = Histogram(
            "neo_router_predicted_wait_seconds", "That a chosen backend lets a call wait.",
            buckets=FIRST_MESSAGE_BUCKETS, registry=registry,
        )  # fmt: skip
        self.hedges = Counter(
            "neo_router_hedges", "Calls made on a second backend beside a slow first.",
            registry=registry,
        )  # fmt: skip
        self.hedges_won = Counter(
            "neo_router_hedges_won", "Hedged calls that the second backend answered first.",
            registry=registry,
        )  # fmt: skip
        self.ejections = Counter(
            "neo_router_ejections", "Times that a backend was left out for failing its calls.",
            ["backend"], registry=registry,
        )  # fmt: skip
        self.messages = Counter("neo_router_messages", "Messages relayed.", registry=registry)
        self.first_message = Histogram(
            "neo_router_first_message_seconds", "From a call to the first message of its answer.",
            ["method"], buckets=FIRST_MESSAGE_BUCKETS, registry=registry,
        )  # fmt: skip
        self.state = Gauge(
            "neo_router_backend_state", "1 for the state that each backend is in, else 0.",
            ["backend", "state"], registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "neo_router_backend_in_flight", "Calls open on each backend.", ["backend"],
            registry=registry,
        )  # fmt: skip

    def expect(self, path: str) -> None:
        """`path` will be called: its series begins at zero, now, or rate() would miss whatever came
        before the first look at it."""
        self.first_message.labels(path.rpartition("/")[2])

    @contextmanager
    def measure(self, path: str, metadata: Any = ()) -> Iterator[Measured]:
        """Counts one call of `path`, `/package.Service/Method`, when the block ends, and traces it.
        metadata: the client's."""
        method = path.rpartition("/")[2]
        with self._tracer.call(f"route {method}", metadata, passes_on=True) as span:
            measured = Measured(self, method, span)
            try:
                yield measured
            except asyncio.CancelledError:
                measured.code = "CANCELLED"
                raise
            except ServiceError as error:
                measured.code = error.code.name
                raise
            finally:
                self.calls.labels(method, measured.code).inc()
                span.set(rpc__response__status_code=measured.code)
                if measured.code not in ("OK", "CANCELLED"):
                    self.recent.failed()

    def chose(self, policy: str, how: str, wait: float) -> None:
        """See Chooser."""
        self.choices.labels(policy, how).inc()
        self.predicted_wait.observe(wait)

    def update(self, backends: tuple[Backend, ...], now: float) -> None:
        """Bring the gauges up to date."""
        for gone in self._shown - {backend.address for backend in backends}:
            for each in BackendState:
                self.state.remove(gone, each.value)
            self.in_flight.remove(gone)
            with suppress(KeyError):  # it had no calls
                self.attempts.remove(gone)
        self._shown = {backend.address for backend in backends}
        for backend in backends:
            state, _ = backend.assess(now)
            for each in BackendState:
                self.state.labels(backend.address, each.value).set(each is state)
            self.in_flight.labels(backend.address).set(backend.in_flight)
