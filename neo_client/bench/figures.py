"""Figures of a run, from all its samples. Percentiles are exact: the smallest sample that at least
so many percent do not exceed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from neo_client.bench.sample import Sample

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
LATENCIES: dict[str, Callable[[Sample], float | None]] = {
    "ttft": lambda s: s.ttft,
    "tpot": lambda s: s.tpot,
    "e2e": lambda s: s.e2e,
    "sent_ttft": lambda s: s.sent_ttft,
    "sent_e2e": lambda s: s.sent_e2e,
    "delay": lambda s: s.delay,
    "queue": lambda s: s.usage.queue_seconds if s.usage is not None else None,
    "server_ttft": lambda s: s.usage.ttft_seconds if s.usage is not None else None,
}
"""By request. Beside them: itl, between two messages with tokens of a request."""
DISTRIBUTIONS = (*LATENCIES, "itl")
ABOUT = {
    "ttft": "time to first token, from the intended send time",
    "tpot": "mean time per output token after the first",
    "itl": "between two messages with tokens of one request",
    "e2e": "end to end, from the intended send time",
    "sent_ttft": "time to first token, from the actual send time",
    "sent_e2e": "end to end, from the actual send time",
    "delay": "from the intended to the actual send time",
    "queue": "in the server's queue, as it says",
    "server_ttft": "time to first token, as the server says",
}
TARGETS = ("ttft", "tpot", "e2e", "itl")
"""What a goodput target can be for; `itl`: the longest gap of a request."""
RATES = (
    "requests", "requests_per_second", "output_tokens", "output_tokens_per_second",
    "prompt_tokens", "total_tokens_per_second", "failed", "failed_share", "host_token_share",
    "cached_prompt_share", "tokens_per_message", "seconds",
)  # fmt: skip
GOODPUT = ("goodput_share", "goodput_per_second")
EFFICIENCY = ("tokens_per_gpu_second", "tokens_per_core_second", "tokens_per_usd")


def percentile_name(percent: float) -> str:
    return f"p{percent:g}"


def names() -> set[str]:
    """Of everything that `flat` may have."""
    ends = ["mean", "min", "max", *map(percentile_name, PERCENTILES)]
    latencies = {f"{name}_{end}_ms" for name in DISTRIBUTIONS for end in ends}
    return latencies | {*RATES, *GOODPUT, *EFFICIENCY, "client_core_share"}


def distribution(values: Iterable[float]) -> dict[str, float]:
    """Of seconds, in milliseconds; empty without any."""
    ordered = np.sort(np.fromiter(values, dtype=np.float64)) * 1e3
    if not len(ordered):
        return {}
    found = np.percentile(ordered, PERCENTILES, method="inverted_cdf")
    return {
        "count": len(ordered),
        "mean": round(float(ordered.mean()), 4),
        "min": round(float(ordered[0]), 4),
        **{percentile_name(p): round(float(v), 4) for p, v in zip(PERCENTILES, found, strict=True)},
        "max": round(float(ordered[-1]), 4),
    }


def figures(samples: Sequence[Sample], targets: Mapping[str, float]) -> dict[str, Any]:
    """Of requests that are not of the warm-up. `targets`: milliseconds by name of `TARGETS`; a
    request that failed meets none."""
    measured = [sample for sample in samples if not sample.warmup]
    ended = [sample for sample in measured if sample.ok]
    latencies = {
        name: distribution(v for s in ended if (v := read(s)) is not None)
        for name, read in LATENCIES.items()
    }
    latencies["itl"] = distribution(gap for sample in ended for gap in sample.gaps)
    failures = Counter(
        f"{s.code} {s.reason}".strip() for s in measured if not s.ok
    )  # fmt: skip
    found = {
        "latencies_ms": latencies,
        "rates": _rates(measured, ended),
        "failures": dict(failures.most_common()),
    }
    if targets:
        good = sum(meets(sample, targets) for sample in ended)
        seconds = found["rates"]["seconds"]
        found["goodput"] = {
            "targets_ms": dict(targets),
            "goodput_share": round(good / len(measured), 5) if measured else 0.0,
            "goodput_per_second": round(good / seconds, 4) if seconds else 0.0,
        }
    return found


def _rates(measured: Sequence[Sample], ended: Sequence[Sample]) -> dict[str, Any]:
    """Over the time from the first intended send to the last end."""
    first = min((sample.due for sample in measured), default=0.0)
    seconds = max((sample.end for sample in measured), default=0.0) - first
    output = sum(sample.tokens for sample in ended)
    prompt = sum(sample.prompt_tokens for sample in ended)
    host = sum(s.usage.host_tokens for s in ended if s.usage is not None)
    cached = sum(s.usage.cached_prompt_tokens for s in ended if s.usage is not None)
    failed = len(measured) - len(ended)
    return {
        "requests": len(measured),
        "seconds": round(seconds, 4),
        "requests_per_second": _per(len(ended), seconds),
        "output_tokens": output,
        "output_tokens_per_second": _per(output, seconds),
        "prompt_tokens": prompt,
        "total_tokens_per_second": _per(output + prompt, seconds),
        "failed": failed,
        "failed_share": _per(failed, len(measured)),
        "host_token_share": _per(host, output),
        "cached_prompt_share": _per(cached, prompt),
        "tokens_per_message": _per(output, sum(sample.messages for sample in ended)),
    }


def _per(value: float, of: float) -> float:
    return round(value / of, 5) if of > 0 else 0.0


def meets(sample: Sample, targets: Mapping[str, float]) -> bool:
    """A figure that a request does not have (a single token's TPOT) misses no target."""
    seen = {
        "ttft": sample.ttft,
        "tpot": sample.tpot,
        "e2e": sample.e2e,
        "itl": max(sample.gaps, default=None),
    }
    return all(
        (value := seen[name]) is None or 1e3 * value <= limit for name, limit in targets.items()
    )


def flat(result: Mapping[str, Any]) -> dict[str, float]:
    """Name -> value of all figures of a result; see `names`."""
    found = result["figures"]
    values: dict[str, float] = {
        f"{name}_{end}_ms": value
        for name, ends in found["latencies_ms"].items()
        for end, value in ends.items()
        if end != "count"
    }
    for part in ("rates", "efficiency"):
        values.update(found.get(part) or {})
    goodput = found.get("goodput") or {}
    values.update({name: goodput[name] for name in GOODPUT if name in goodput})
    values["client_core_share"] = result["client"]["load"]["loop_core_share"]
    return {name: value for name, value in values.items() if name in names()}
