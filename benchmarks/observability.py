"""What metrics and traces cost where they are counted, in microseconds; see docs/perf-log.md.

python -m benchmarks.observability
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from gpu_service.engine.counters import WorkCounters
from gpu_service.engine.messages import SamplingSpec, Submit
from gpu_service.engine.traces import RequestTraces
from gpu_service.frontend.dispatch import Update
from gpu_service.frontend.metrics import FrontendMetrics
from gpu_service.frontend.observed import Observed
from gpu_service.scheduling.plan import DecodeRow, IterationPlan, Mode, SubBatch, SweepResult
from neo_common.metrics import expose
from neo_common.tracing import NO_TRACES, TracingSettings, open_tracer
from protos.neo.v1 import inference_pb2 as inference
from router.metrics import RouterMetrics

ROWS = 64


def microseconds(work: Callable[[], object], number: int = 2000) -> float:
    """Of the best of five rounds."""
    return 1e6 * min(timeit.repeat(work, number=number, repeat=5)) / number


def engine_core() -> dict[str, float]:
    blocks = np.arange(3, dtype=np.int32)
    rows = tuple(DecodeRow(key, 5, 20, blocks) for key in range(ROWS))
    plan = IterationPlan(1, Mode.INLINE, (), (SubBatch(gpu_decode=rows),))
    counters, traces, result = WorkCounters(), RequestTraces(), SweepResult()
    steering: Any = SimpleNamespace(predictor=None)
    return {
        "iteration of 64 rows: counted": microseconds(lambda: counters.count(plan, result, 0.01)),
        "iteration: nothing is traced": microseconds(lambda: traces.count(plan, result, 0, 1)),
        "iteration: no report is due": microseconds(
            lambda: counters.report(0.0, 0, steering, idle=False)
        ),
    }


def front_end() -> dict[str, float]:
    metrics = FrontendMetrics("m", 131072)
    sampling = SamplingSpec(max_tokens=9)
    submit = Submit(request_id="a", prompt_token_ids=[1], sampling=sampling, arrival=0.0)
    observed = Observed(metrics, submit)
    update = Update([inference.Choice(index=0, token_ids=[5])])
    return {
        "message of one token": microseconds(lambda: observed.take_in(update)),
        "scrape, in a thread of its own": microseconds(lambda: expose(metrics.registry, ""), 20),
    }


def router() -> dict[str, float]:
    metrics = RouterMetrics(CollectorRegistry())

    def call(of: RouterMetrics) -> None:
        with of.measure("/a/b") as measured:
            measured.attempt("b")
            measured.message()

    with metrics.measure("/a/b") as measured:
        message = microseconds(measured.message)
    figures = {"message relayed": message, "call, no traces": microseconds(lambda: call(metrics))}
    for name, ratio in (("call, traces on, not sampled", 0.0), ("call, traced", 1.0)):
        # Nobody listens there: spans are made, queued and dropped.
        settings = TracingSettings("http://127.0.0.1:9", ratio)
        traced = RouterMetrics(CollectorRegistry(), tracer=open_tracer("router", settings))
        figures[name] = microseconds(lambda of=traced: call(of), 500)  # type: ignore[misc]
    assert NO_TRACES is open_tracer("router", TracingSettings())
    return figures


def main() -> None:
    for where, figures in (
        ("engine core", engine_core()), ("front end", front_end()), ("router", router())
    ):  # fmt: skip
        for what, value in figures.items():
            print(f"{where:12} {what:32} {value:9.2f} us")


if __name__ == "__main__":
    main()
