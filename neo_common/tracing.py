"""Traces, where an operator asks for them: W3C trace context in, spans out over OTLP.

    tracer = open_tracer("router", settings)          NO_TRACES without trace_endpoint
    with tracer.call("GenerateStream", metadata) as span:
        span.event("attempt", backend="10.0.0.1:7001")
    tracer.close()

Without an endpoint nothing of OpenTelemetry is imported, and a span is a call that does nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neo_common.errors import ServiceError
from neo_common.version import version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

TRACEPARENT = "traceparent"
Attribute = str | int | float | bool
EXPORT_SECONDS = 5.0
"""How long the collector may take for a batch."""
CLOSE_SECONDS = 2.0
"""How long the end of a process waits for its last spans."""

_current: ContextVar[str] = ContextVar("neo_traceparent", default="")


def current_traceparent() -> str:
    """Of the span that this task is in, for calls that it makes; "" without traces."""
    return _current.get()


@dataclass(frozen=True)
class TracingSettings:
    """Mixed into the configuration of services that traces go through."""

    trace_endpoint: str = ""
    """OTLP collector (gRPC) that traces are sent to, such as http://127.0.0.1:4317; needs the extra
    `tracing`. Empty: no traces."""
    trace_sample_ratio: float = 0.01
    """Part of the calls that are traced, where the caller's `traceparent` does not decide."""

    def validate_tracing(self) -> None:
        """Raises ValueError naming the field."""
        if not 0 <= self.trace_sample_ratio <= 1:
            raise ValueError("trace_sample_ratio must be between 0 and 1")
        if self.trace_endpoint and not self.trace_endpoint.startswith(("http://", "https://")):
            raise ValueError("trace_endpoint must begin with http:// or https://")


class Span:
    """One call as it goes, or none: the methods of this class do nothing."""

    recording = False
    trace_id = ""
    """32 hexadecimal digits while recording."""

    def event(self, name: str, **attributes: Attribute) -> None:
        """Something happened now."""

    def set(self, **attributes: Attribute) -> None:
        """Dots are written as double underscores: `gen_ai__request__model`."""

    def child(
        self, name: str, start: float, end: float, attributes: Mapping[str, Attribute]
    ) -> None:
        """A part of it that is over; times of `time.monotonic()`."""


class Tracer:
    """Makes spans that do nothing. Lives as long as its process."""

    def call(
        self, name: str, metadata: Any, *, passes_on: bool = False
    ) -> AbstractContextManager[Span]:
        """Around one call that is served. metadata: the caller's, whose `traceparent` counts.
        passes_on: what the task calls meanwhile belongs to the span; not for generators, which may
        end in another task."""
        return nullcontext(NO_SPAN)

    def close(self) -> None:
        """Send what is left."""


NO_SPAN = Span()
NO_TRACES = Tracer()


def open_tracer(service: str, settings: TracingSettings) -> Tracer:
    """Raises ValueError when the packages are not there."""
    if not settings.trace_endpoint:
        return NO_TRACES
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise ValueError(
            f"trace_endpoint needs pip install 'neo-serving[tracing]': {error}"
        ) from error
    exporter = OTLPSpanExporter(
        endpoint=settings.trace_endpoint,
        insecure=settings.trace_endpoint.startswith("http://"),
        timeout=EXPORT_SECONDS,
    )
    provider = TracerProvider(
        resource=Resource.create(
            {"service.name": f"neo-{service.replace('_', '-')}", "service.version": version()}
        ),
        sampler=ParentBased(TraceIdRatioBased(settings.trace_sample_ratio)),
        shutdown_on_exit=False,
    )
    # Its queue is bounded: spans that come faster than they can be sent are dropped.
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return _OtelTracer(provider)


class _OtelTracer(Tracer):
    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("neo-serving", version())
        self._context = TraceContextTextMapPropagator()

    @contextmanager
    def call(self, name: str, metadata: Any, *, passes_on: bool = False) -> Iterator[Span]:
        from opentelemetry import trace

        carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
        parent = self._context.extract(carrier)
        span = self._tracer.start_span(name, parent, kind=trace.SpanKind.SERVER)
        token = None
        if passes_on:
            self._context.inject(carrier, trace.set_span_in_context(span))
            token = _current.set(carrier[TRACEPARENT])
        try:
            yield _OtelSpan(self._tracer, span) if span.is_recording() else NO_SPAN
        except ServiceError as error:
            span.set_status(trace.StatusCode.ERROR, error.reason)
            raise
        except Exception as error:
            # Not its message: that may hold what a client sent.
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            if token is not None:
                _current.reset(token)
            span.end()

    def close(self) -> None:
        # A collector that is away is tried again and again: no reason not to end.
        last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(CLOSE_SECONDS)


class _OtelSpan(Span):
    recording = True

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer = tracer
        self._span = span
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def event(self, name: str, **attributes: Attribute) -> None:
        self._span.add_event(name, _dotted(attributes))

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes(_dotted(attributes))

    def child(
        self, name: str, start: float, end: float, attributes: Mapping[str, Attribute]
    ) -> None:
        from opentelemetry import trace

        offset = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            name,
            trace.set_span_in_context(self._span),
            attributes=dict(attributes),
            start_time=offset + int(1e9 * start),
        )
        span.end(end_time=offset + int(1e9 * end))


def _dotted(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {key.replace("__", "."): value for key, value in attributes.items()}
