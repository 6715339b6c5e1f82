"""W3C trace context in a call's metadata."""

from __future__ import annotations

from functools import cache

from opentelemetry.sdk.trace import TracerProvider

from neo_common.tracing import TRACEPARENT, Tracer, _OtelTracer, current_traceparent
from tests.fuzz.target import Finding, Target


@cache
def _tracer() -> Tracer:
    return _OtelTracer(TracerProvider(shutdown_on_exit=False))


def _one(data: bytes) -> None:
    """Lines are `traceparent`, `tracestate` and `baggage`, several of each as they come."""
    keys = (TRACEPARENT, "tracestate", "baggage", TRACEPARENT)
    lines = data.decode("latin-1").split("\n")
    metadata = [(keys[number % 4], line) for number, line in enumerate(lines)]
    with _tracer().call("Generate", metadata, passes_on=True) as span:
        span.set(gen_ai__request__model="tiny")
        said = current_traceparent()
        if len(said) != 55 or not said.isascii():
            raise Finding(f"{said!r} is sent on")


def seeds() -> list[bytes]:
    parent = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    return [parent, parent + b"\nvendor=value,other@tenant=1\nkey=value;a=b", b"", b"cc-" + parent]


_WORDS = (b"-", b"=", b",", b";", b"ff", b"00000000000000000000000000000000", b"@", b"\xff")
TARGET = Target("traceparent", _one, seeds, "text", _WORDS)
