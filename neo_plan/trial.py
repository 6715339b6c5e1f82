"""One replica under its part of the load, simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from neo_client.workloads import Lengths
from neo_plan.demand import Part
from neo_plan.node import Node
from neo_plan.simulator.figures import figures
from neo_plan.simulator.run import Life, Trace, simulate

TARGETS = ("ttft", "tpot", "e2e")
WARM_SHARE = 0.1
"""First requests, which found an empty machine and are not judged."""


@dataclass(frozen=True)
class Trial:
    """What a replica did. Latencies in milliseconds."""

    share: float
    """Requests that met all targets."""
    missed: str
    """The target that most others missed; "" where none was."""
    requests_per_second: float
    tokens_per_second: float
    """Output."""
    host_share: float
    """Of tokens that were decoded on the host tier."""
    gpu_busy: float
    cpu_busy: float
    """Of the attention threads."""
    in_system: float
    """Requests that wait or run, on average."""
    decode_rows: float
    recomputations: int
    latencies: dict[str, dict[str, float]]


def run(node: Node, part: Part, targets: Mapping[str, float]) -> Trial:
    """ValueError if it can never serve one of them."""
    trace = simulate(node.machine(), node.limits(), part.lengths, part.arrivals)
    found = figures(trace)
    judged = trace.lives[int(WARM_SHARE * len(trace.lives)) :]
    seen = [latencies(life) for life in judged]
    missed = {
        name: sum(each[name] > limit for each in seen if name in each)
        for name, limit in targets.items()
    }
    good = sum(all(each.get(n, 0.0) <= limit for n, limit in targets.items()) for each in seen)
    worst = max(missed, key=lambda name: missed[name], default="")
    waited = sum(life.tokens[-1] - life.arrival for life in trace.lives)
    tokens = sum(len(life.tokens) for life in trace.lives)
    return Trial(
        share=good / len(seen),
        missed=worst if missed.get(worst) else "",
        requests_per_second=float(found["requests_per_second"]),
        tokens_per_second=float(found["output_tokens_per_second"]),
        host_share=trace.host_tokens / tokens,
        gpu_busy=round(1 - float(found["gpu_idle_share"]), 4),
        cpu_busy=round(1 - float(found["cpu_idle_share"]), 4),
        in_system=round(waited / _seconds(trace), 2),
        decode_rows=float(found["middle_decode_rows"]),
        recomputations=trace.recomputations,
        latencies={name: _percentiles([each[name] for each in seen if name in each])
                   for name in TARGETS},
    )  # fmt: skip


def latencies(life: Life) -> dict[str, float]:
    """Milliseconds; no TPOT for a single token."""
    first, last = life.tokens[0], life.tokens[-1]
    found = {"ttft": 1e3 * (first - life.arrival), "e2e": 1e3 * (last - life.arrival)}
    if len(life.tokens) > 1:
        found["tpot"] = 1e3 * (last - first) / (len(life.tokens) - 1)
    return found


def _seconds(trace: Trace) -> float:
    return max(trace.seconds - trace.lives[0].arrival, 1e-9)


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    points = np.percentile(values, [50, 95, 99], method="inverted_cdf")
    return {f"p{p}": round(float(v), 2) for p, v in zip((50, 95, 99), points, strict=True)}


def capacity(node: Node, lengths: list[Lengths]) -> float:
    """Requests a second of a run in which all are there from the start, or of its middle if that is
    less (docs/perf-log.md has both for the measured machine); 0 where one of them does not fit."""
    try:
        trace = simulate(node.machine(), node.limits(), lengths, [0.0] * len(lengths))
    except ValueError:
        return 0.0
    found = figures(trace)
    rates = (found["requests_per_second"], found["middle_requests_per_second"])
    return min(float(rate) for rate in rates if rate)
