"""Whether a soak was survived: what must be flat, by which rule.

- Nothing failed: no wrong token, no end that its ask does not allow (UNAVAILABLE is excused while a
  fault is on, RESOURCE_EXHAUSTED with a retry delay always), no wrong exit code, no orphan.
- No block of any tier is in use in an idle window.
- Steady processes, over the last 80% of the run, by the Theil-Sen slope (the median of the slopes
  between all pairs of samples, which a fifth of wild ones does not move): anonymous memory grows by
  no more than HEAP_MIB_PER_HOUR, unless that is less than HEAP_MIB in all; descriptors, memfds and
  threads by no more than COUNT in all.
- Latency: the median time of streams in calm windows, over that of a fixed piece of work at the
  same time, is in the last third no more than LATENCY_RATIO of that in the first third.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STEADY = ("routers.0", "gpus.0", "gpus.0/core", "cpus.1")
HEAP_MIB_PER_HOUR = 10.0
HEAP_MIB = 16.0
COUNT = 4.0
LATENCY_RATIO = 2.0
CALM_WINDOWS = 6
"""Fewest in a third, for a word about latency."""
SKIPPED = 0.2
"""Part at the start in which caches fill."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    said: str


def slope_per_hour(seconds: Sequence[float], values: Sequence[float]) -> float:
    """Theil-Sen; 0 for fewer than two samples."""
    x, y = np.asarray(seconds, float), np.asarray(values, float)
    first, second = np.triu_indices(len(x), 1)
    apart = x[second] - x[first]
    keep = apart > 0
    if not keep.any():
        return 0.0
    return float(np.median((y[second] - y[first])[keep] / apart[keep])) * 3600


def verdict(result: Mapping[str, Any]) -> list[Check]:
    checks = [
        Check("failures", not result["failed"], str(result["failed"] or "none")),
        _answers(result),
        _blocks(result["idle"]),
    ]
    for name in STEADY:
        checks += _process(name, [held for held in result["held"] if held["name"] == name])
    checks.append(_latency(result["windows"]))
    return checks


def _answers(result: Mapping[str, Any]) -> Check:
    checked = result["checked"]
    return Check("answers", checked > 0, f"{checked} whole answers equal the known ones")


def _blocks(idle: Sequence[Mapping[str, Any]]) -> Check:
    leaked = [window for window in idle if any(window["blocks"].values())]
    said = f"{len(idle)} idle windows" + (f", in use: {leaked[-1]['blocks']}" if leaked else "")
    return Check("blocks", bool(idle) and not leaked, said)


def _process(name: str, held: Sequence[Mapping[str, Any]]) -> list[Check]:
    if len({sample["pid"] for sample in held}) != 1:
        return [Check(name, False, "it is not one process from start to end")]
    begin, end = held[0]["at"], held[-1]["at"]
    late = [sample for sample in held if sample["at"] >= begin + SKIPPED * (end - begin)]
    at = [sample["at"] for sample in late]
    hours = (at[-1] - at[0]) / 3600
    checks = []
    for what in ("heap", "fds", "memfds", "threads"):
        values = [sample[what] for sample in late]
        slope = slope_per_hour(at, values)
        grown = slope * hours
        if what == "heap":
            passed = slope <= HEAP_MIB_PER_HOUR or grown <= HEAP_MIB
            unit = " MiB"
        else:
            passed, unit = grown <= COUNT, ""
        said = f"{slope:+.2f}{unit} per hour, {grown:+.2f} in all, last {values[-1]:g}{unit}"
        checks.append(Check(f"{name} {what}", passed, said))
    return checks


def _latency(windows: Sequence[Mapping[str, Any]]) -> Check:
    calm = [w for w in windows if w["calm"] and w["e2e_ms"] is not None]
    third = len(calm) // 3
    if third < CALM_WINDOWS:
        return Check("latency", True, f"not judged: {len(calm)} calm windows")
    relative = [w["e2e_ms"]["p50"] / w["probe_ms"] for w in calm]
    first, last = (statistics.median(part) for part in (relative[:third], relative[-third:]))
    plain = [
        statistics.median(w["e2e_ms"]["p50"] for w in part)
        for part in (calm[:third], calm[-third:])
    ]
    said = (
        f"median {plain[0]:.0f} -> {plain[1]:.0f} ms in {len(calm)} calm windows, "
        f"{last / first:.2f} times the first third's in units of the probe"
    )
    return Check("latency", last <= LATENCY_RATIO * first, said)
