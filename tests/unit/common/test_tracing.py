"""Spans: whose children they are, when there are any, and that they cost nothing when off."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from neo_common.errors import Reason, ServiceError
from neo_common.tracing import (
    NO_SPAN,
    NO_TRACES,
    TRACEPARENT,
    TracingSettings,
    current_traceparent,
    open_tracer,
)
from tests.support.collector import Seen, collector
from tests.support.stack import REPO, free_port

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def sampled(flag: str = "01") -> tuple[tuple[str, str | bytes], ...]:
    return ((TRACEPARENT, f"00-{TRACE}-{PARENT}-{flag}"), ("x-bin", b"\0"))


def named(spans: list[Seen], name: str) -> Seen:
    (span,) = [span for span in spans if span.name == name]
    return span


def test_without_an_endpoint_nothing_is_made_or_imported() -> None:
    code = (
        "import sys, router.app, gpu_service.__main__\n"
        "from neo_common.tracing import NO_TRACES, TracingSettings, open_tracer\n"
        "assert open_tracer('router', TracingSettings()) is NO_TRACES\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
    with NO_TRACES.call("x", sampled(), passes_on=True) as span:
        assert span is NO_SPAN
        assert current_traceparent() == ""


def test_a_callers_trace_goes_on_and_is_passed_on() -> None:
    with collector() as kept:
        settings = TracingSettings(trace_endpoint=kept.endpoint, trace_sample_ratio=0.0)
        tracer = open_tracer("gpu_service", settings)
        now = time.monotonic()
        with tracer.call("generate", sampled(), passes_on=True) as span:
            assert span.recording
            assert span.trace_id == TRACE
            passed_on = current_traceparent()
            span.event("attempt", backend="b")
            span.set(gen_ai__usage__input_tokens=3)
            span.child("queue", now, now + 0.5, {"neo.tier": "gpu"})
        assert current_traceparent() == ""
        tracer.close()
        spans = kept.spans()
    generate, queue = named(spans, "generate"), named(spans, "queue")
    assert (generate.service, generate.trace_id, generate.parent_id) == (
        "neo-gpu-service", TRACE, PARENT
    )  # fmt: skip
    assert passed_on == f"00-{TRACE}-{generate.span_id}-01"
    assert generate.attributes == {"gen_ai.usage.input_tokens": 3}
    assert generate.events == [("attempt", {"backend": "b"})]
    assert queue.parent_id == generate.span_id
    assert queue.attributes == {"neo.tier": "gpu"}
    assert abs(queue.end_ns - queue.start_ns - 5e8) < 1e6
    assert abs(queue.start_ns - time.time_ns()) < 60e9


@pytest.mark.parametrize(("ratio", "metadata", "expected"), [
    (0.0, (), False), (1.0, (), True), (1.0, sampled("00"), False), (0.0, sampled("01"), True),
])  # fmt: skip
def test_the_caller_decides_and_else_the_ratio(
    ratio: float, metadata: tuple[tuple[str, str | bytes], ...], expected: bool
) -> None:
    with collector() as kept:
        settings = TracingSettings(trace_endpoint=kept.endpoint, trace_sample_ratio=ratio)
        tracer = open_tracer("router", settings)
        with tracer.call("route", metadata, passes_on=True) as span:
            assert span.recording is expected
            # Backends must not decide anew.
            assert int(current_traceparent()[-2:], 16) & 1 == expected
        tracer.close()
        assert len(kept.spans()) == expected


def test_errors_are_named_by_their_reason_alone() -> None:
    with collector() as kept:
        tracer = open_tracer("router", TracingSettings(kept.endpoint, 1.0))
        with pytest.raises(ServiceError), tracer.call("refused", ()):
            raise ServiceError(Reason.QUEUE_FULL, "secret words")
        with pytest.raises(KeyError), tracer.call("broken", ()):
            raise KeyError("secret words")
        tracer.close()
        spans = kept.spans()
    assert named(spans, "refused").failed
    assert named(spans, "broken").failed
    assert "secret" not in repr(spans)


def test_a_collector_that_is_away_holds_nobody_up() -> None:
    settings = TracingSettings(f"http://127.0.0.1:{free_port()}", 1.0)
    tracer, start = open_tracer("router", settings), time.monotonic()
    for _ in range(3000):
        with tracer.call("route", ()):
            pass
    tracer.close()
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("settings", "field"), [
    (TracingSettings("127.0.0.1:4317"), "trace_endpoint"),
    (TracingSettings(trace_sample_ratio=1.5), "trace_sample_ratio"),
])  # fmt: skip
def test_settings_are_checked(settings: TracingSettings, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        settings.validate_tracing()
