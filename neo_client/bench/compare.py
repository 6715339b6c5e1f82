"""Two runs side by side: what changed, and which changes the samples can carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neo_client.bench.figures import flat

Floats = NDArray[np.float64]

DRAWS = 4000
CONFIDENCE_PERCENT = 95.0
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
MIN_ABOVE = 5
"""A percentile with fewer samples beyond it says little; it gets no interval."""
LEAST_PERCENT = 1.0
"""A change that may be smaller is unclear: two runs of one thing differ by that."""
PLAIN = (
    "requests_per_second", "output_tokens_per_second", "total_tokens_per_second", "goodput_share",
    "goodput_per_second", "failed_share", "host_token_share", "cached_prompt_share",
    "tokens_per_gpu_second", "tokens_per_core_second", "tokens_per_usd",
)  # fmt: skip
LOWER_IS_BETTER = ("failed_share",)
NEUTRAL = ("host_token_share", "cached_prompt_share")


@dataclass(frozen=True)
class Change:
    """One figure in both runs."""

    name: str
    before: float
    after: float
    interval: tuple[float, float] | None = None
    """Of the change in percent, with `CONFIDENCE_PERCENT`; None: no samples to tell it from."""
    lower_is_better: bool | None = None
    """None: neither is."""

    @property
    def percent(self) -> float | None:
        return 100 * (self.after / self.before - 1) if self.before else None

    @property
    def verdict(self) -> str:
        """ "better", "worse", "unclear" (within what the samples scatter), or "" where none of that
        can be said."""
        if self.interval is None or self.lower_is_better is None:
            return ""
        low, high = self.interval
        if low <= LEAST_PERCENT and high >= -LEAST_PERCENT:
            return "unclear"
        return "better" if (high < 0) == self.lower_is_better else "worse"


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Latencies with intervals from each run's requests, then rates."""
    changes = []
    first, second = latencies_of(before), latencies_of(after)
    for name in ("ttft", "tpot", "e2e"):
        a, b = first[name], second[name]
        if not len(a) or not len(b):
            continue
        changes.append(
            Change(f"{name}_mean_ms", float(a.mean()), float(b.mean()), _mean_interval(a, b), True)
        )
        for label, share in QUANTILES.items():
            x, y = (float(np.percentile(v, 100 * share, method="inverted_cdf")) for v in (a, b))
            interval = _quantile_interval(a, b, share)
            changes.append(Change(f"{name}_{label}_ms", x, y, interval, True))
    one, two = flat(before), flat(after)
    for name in ("itl_p50_ms", "itl_p99_ms"):
        if name in one and name in two:
            changes.append(Change(name, one[name], two[name], None, True))
    for name in PLAIN:
        if name in one and name in two:
            better = None if name in NEUTRAL else name in LOWER_IS_BETTER
            changes.append(Change(name, one[name], two[name], None, better))
    return changes


def latencies_of(result: Mapping[str, Any]) -> dict[str, Floats]:
    """Milliseconds of all requests that count, sorted."""
    rows = [dict(zip(result["columns"], row, strict=True)) for row in result["requests"]]
    rows = [row for row in rows if not row["warmup"] and row["code"] == "OK"]
    values = {
        "ttft": [row["first"] - row["due"] for row in rows if row["first"] is not None],
        "tpot": [
            (row["last"] - row["first"]) / (row["tokens"] - 1) for row in rows if row["tokens"] > 1
        ],
        "e2e": [row["end"] - row["due"] for row in rows],
    }
    return {name: np.sort(np.asarray(found)) * 1e3 for name, found in values.items()}


def _quantile_interval(a: Floats, b: Floats, share: float) -> tuple[float, float] | None:
    if min(len(a), len(b)) * min(share, 1 - share) < MIN_ABOVE:
        return None
    draw = np.random.default_rng(0)
    return _interval(_quantiles(draw, a, share), _quantiles(draw, b, share))


def _quantiles(draw: np.random.Generator, ordered: Floats, share: float) -> Floats:
    """Of `DRAWS` bootstrap samples, without drawing these: the k-th smallest of n uniform draws is
    Beta(k, n - k + 1) distributed, and says which of the ordered values it is."""
    n = len(ordered)
    k = int(np.ceil(share * n))
    places = (draw.beta(k, n - k + 1, DRAWS) * n).astype(np.int64)
    found: Floats = ordered[np.minimum(places, n - 1)]
    return found


def _mean_interval(a: Floats, b: Floats) -> tuple[float, float] | None:
    if min(len(a), len(b)) < 2 * MIN_ABOVE:
        return None
    draw = np.random.default_rng(0)
    first, second = (draw.normal(v.mean(), v.std(ddof=1) / np.sqrt(len(v)), DRAWS) for v in (a, b))
    return _interval(first, second)


def _interval(before: Floats, after: Floats) -> tuple[float, float] | None:
    if (before <= 0).any():
        return None
    tail = (100 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(100 * (after / before - 1), [tail, 100 - tail])
    return round(float(low), 2), round(float(high), 2)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What makes two runs hard to compare, in words."""
    found = []
    for name in sorted({*before["options"], *after["options"]} - {"name", "address"}):
        a, b = before["options"].get(name), after["options"].get(name)
        if a != b:
            found.append(f"option {name.replace('_', '-')}: {a} and {b}")
    one, two = before["client"]["machine"], after["client"]["machine"]
    for name in ("cpu", "cpus_allowed", "commit"):
        if one.get(name) != two.get(name):
            found.append(f"client's {name}: {one.get(name)} and {two.get(name)}")
    if before["server"].get("model") != after["server"].get("model"):
        found.append(f"model: {before['server'].get('model')} and {after['server'].get('model')}")
    return found
