"""Which plots a report has, from one or several results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from neo_client.bench.compare import latencies_of
from neo_client.bench.report.svg import Mark, Plot, Point, Series, draw

Runs = Sequence[tuple[str, Mapping[str, Any]]]
CDF_POINTS, SLOWEST = 300, 50
MAX_DOTS = 2500
LOG_RATIO = 30.0
"""Values that spread more than that are shown on a logarithmic axis."""
LABELS = {"ttft": "Time to first token", "tpot": "Time per output token", "e2e": "End to end"}


def distributions(runs: Runs) -> list[str]:
    """How many percent of requests took at most so long."""
    found = {name: [latencies_of(result)[name] for _, result in runs] for name in LABELS}
    plots = [
        _cdf(LABELS[name], values, runs, _target(runs, name)) for name, values in found.items()
    ]
    gaps = [np.asarray(result["itl_quantiles_ms"]) for _, result in runs]
    plots.insert(2, _cdf("Inter-token latency", gaps, runs, None, of="messages"))
    return plots


def _target(runs: Runs, name: str) -> float | None:
    """The first run's."""
    targets = runs[0][1]["figures"].get("goodput", {}).get("targets_ms", {})
    limit: float | None = targets.get(name)
    return limit


def _cdf(
    title: str, values: Sequence[Any], runs: Runs, target: float | None, of: str = "requests"
) -> str:
    series = [
        Series(_quantile_points(ordered), number, label=name if len(runs) > 1 else "")
        for number, ((name, _), ordered) in enumerate(zip(runs, values, strict=True))
    ]
    every = np.concatenate([v for v in values if len(v)] or [np.zeros(0)])
    marks = [] if target is None else [Mark(target, f"target {target:g} ms")]
    narrow = bool(len(every)) and float(every.min()) > every.max() / 2
    plot = Plot(
        title, "ms", f"% of {of}", series, log_x=_spreads(every), from_zero=not narrow,
        y_top=100, marks=marks,
    )  # fmt: skip
    return draw(plot)


def _spreads(values: Any) -> bool:
    if not len(values):
        return False
    low, high = float(np.percentile(values, 1)), float(values.max())
    return low > 0 and high / low > LOG_RATIO


def _quantile_points(ordered: Any) -> list[Point]:
    """Evenly spread, and the slowest ones, which matter most, all of them."""
    n = len(ordered)
    places = sorted(
        {*np.linspace(0, n - 1, min(n, CDF_POINTS)).astype(int), *range(max(n - 50, 0), n)}
    )
    return [(float(ordered[i]), 100.0 * (i + 1) / n) for i in places]


def over_time(runs: Runs) -> list[str]:
    several = len(runs) > 1
    plots = [
        _timeline(runs, "Output tokens", "tokens/s", ("tokens",), rate=True),
        _timeline(runs, "Requests under way", "requests", ("under_way",), rate=False),
    ]
    if not several:
        names = ("due", "ended", "failed")
        plots.append(_timeline(runs, "Requests", "requests/s", names, rate=True))
    plots.append(_arrivals(runs))
    return plots


def _timeline(runs: Runs, title: str, unit: str, names: Sequence[str], *, rate: bool) -> str:
    series = []
    for number, (name, result) in enumerate(runs):
        line = result["timeline"]
        width = line["bucket_seconds"]
        for offset, key in enumerate(names):
            if key == "failed" and not any(line[key]):
                continue
            points = [
                (i * width, value / width if rate else value) for i, value in enumerate(line[key])
            ]
            if points:
                points.append((len(points) * width, points[-1][1]))
            label = name if len(names) == 1 and len(runs) > 1 else key.replace("_", " ")
            shown = label if len(names) > 1 or len(runs) > 1 else ""
            series.append(Series(points, number + offset, "steps", shown))
    return draw(Plot(title, "seconds since the start", unit, series))


def _arrivals(runs: Runs) -> str:
    """TTFT of each request where it was due: a queue that grows can be seen."""
    series = []
    for number, (name, result) in enumerate(runs):
        rows = _rows(result)
        points = [(r["due"], 1e3 * (r["first"] - r["due"])) for r in rows]
        series.append(Series(_thin(points), number, "dots", name if len(runs) > 1 else ""))
    return draw(Plot("TTFT by intended time", "seconds since the start", "ms", series))


def by_length(runs: Runs) -> list[str]:
    ways: list[tuple[str, str, str, Callable[[dict[str, Any]], float]]] = [
        ("TTFT by prompt", "prompt tokens", "prompt_tokens", lambda r: r["first"] - r["due"]),
        (
            "TPOT by output", "output tokens", "tokens",
            lambda r: (r["last"] - r["first"]) / (r["tokens"] - 1),
        ),
    ]  # fmt: skip
    plots = []
    for title, label, key, read in ways:
        series = []
        for number, (name, result) in enumerate(runs):
            rows = [row for row in _rows(result) if row["tokens"] > 1]
            points = _thin([(row[key], 1e3 * read(row)) for row in rows])
            series.append(Series(points, number, "dots", name if len(runs) > 1 else ""))
        plots.append(draw(Plot(title, label, "ms", series)))
    return plots


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [dict(zip(result["columns"], row, strict=True)) for row in result["requests"]]
    return [r for r in rows if r["code"] == "OK" and r["first"] is not None and not r["warmup"]]


def _thin(points: list[Point]) -> list[Point]:
    """At most `MAX_DOTS`: the highest hundredth, and every so many of the others."""
    if len(points) <= MAX_DOTS:
        return points
    by_height = sorted(points, key=lambda point: point[1], reverse=True)
    highest = by_height[: len(points) // 100]
    rest = by_height[len(highest) :]
    return highest + rest[:: -(-len(rest) // MAX_DOTS)]
