"""A run in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neo_plan.simulator.run import Sweep, Trace

_PERCENTILES = (50, 90, 99)


def figures(trace: Trace) -> dict[str, Any]:
    """Plain values for JSON. `middle`: from the end of the first fifth of the requests to that of
    the fourth."""
    ends = sorted(life.tokens[-1] for life in trace.lives)
    fifth = len(ends) // 5
    first, last = ends[fifth], ends[-fifth - 1]
    middle = [s for s in trace.sweeps if first <= s.begin < last]
    tokens = sum(len(life.tokens) for life in trace.lives)
    ttft = [life.tokens[0] - life.arrival for life in trace.lives]
    tpot = [
        (life.tokens[-1] - life.tokens[0]) / (len(life.tokens) - 1)
        for life in trace.lives
        if len(life.tokens) > 1
    ]
    return {
        "requests": len(ends),
        "seconds": round(trace.seconds, 3),
        "requests_per_second": round(len(ends) / trace.seconds, 3),
        "middle_requests_per_second": _rate(len(ends) - 2 * fifth - 1, last - first),
        "output_tokens_per_second": round(tokens / trace.seconds, 1),
        "host_tokens": trace.host_tokens,
        "iterations": len(trace.sweeps),
        "middle_decode_rows": round(_mean(middle, [s.decode_rows for s in middle]), 2),
        "middle_sweep_ms": round(1e3 * (last - first) / len(middle), 3) if middle else 0.0,
        "recomputations": trace.recomputations,
        "migrations": trace.migrations,
        "ttft_seconds": _percentiles(ttft),
        "tpot_ms": _percentiles([1e3 * seconds for seconds in tpot]),
        "modes": _modes(trace),
        "gpu_idle_share": round(1 - sum(s.time.gpu for s in trace.sweeps) / 1e3 / trace.seconds, 4),
        "cpu_idle_share": round(1 - sum(s.time.cpu for s in trace.sweeps) / 1e3 / trace.seconds, 4),
    }


def _modes(trace: Trace) -> dict[str, dict[str, float]]:
    """Mode -> iterations, seconds, and how long GPU and CPU had nothing to do in them."""
    found: dict[str, dict[str, float]] = {}
    for mode in sorted({s.time.mode for s in trace.sweeps}):
        times = [s.time for s in trace.sweeps if s.time.mode == mode]
        total = sum(t.total for t in times)
        found[mode] = {
            "iterations": len(times),
            "seconds": round(1e-3 * total, 3),
            "gpu_idle_seconds": round(1e-3 * (total - sum(t.gpu for t in times)), 3),
            "cpu_idle_seconds": round(1e-3 * (total - sum(t.cpu for t in times)), 3),
        }
    return found


def _mean(sweeps: Sequence[Sweep], values: Sequence[float]) -> float:
    """Weighted by the sweeps' times."""
    total = sum(s.end - s.begin for s in sweeps)
    if not total:
        return 0.0
    return sum((s.end - s.begin) * v for s, v in zip(sweeps, values, strict=True)) / total


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{p}": round(ordered[(len(ordered) - 1) * p // 100], 4) for p in _PERCENTILES}
