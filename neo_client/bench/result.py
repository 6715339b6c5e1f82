"""A run as a file: options, machine, server, figures, and a row for each request."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neo_client.bench.drive import TICK_SECONDS, Driver
from neo_client.bench.figures import figures
from neo_client.bench.own import OwnLoad
from neo_client.bench.sample import Sample
from neo_client.prices import Fleet
from neo_common.documents import from_json

SCHEMA = "neo-bench/1"
COLUMNS = (
    "session", "turn", "due", "sent", "first", "last", "end", "prompt_tokens", "tokens",
    "host_tokens", "max_gap", "warmup", "code",
)  # fmt: skip
MAX_BARS = 240
"""Points of the plots over time."""
_ITL_POINTS = 400
"""Of the inter-token latencies, which are too many for a row each, quantiles are kept."""


def result_of(
    driver: Driver,
    *,
    options: Mapping[str, Any],
    targets: Mapping[str, float],
    server: Mapping[str, Any],
    own: OwnLoad,
    machine: Mapping[str, Any],
    fleet: Fleet,
    started_at: str,
    interrupted: bool,
) -> dict[str, Any]:
    """Plain values for JSON. `machine`: the client's."""
    samples = sorted(driver.samples, key=lambda sample: sample.due)
    found = figures(samples, targets)
    rates = found["rates"]
    found["efficiency"] = fleet.efficiency(rates["output_tokens"], rates["seconds"])
    load = own.figures(driver.held_back, [s.delay for s in samples if not s.warmup])
    return {
        "schema": SCHEMA,
        "started_at": started_at,
        "interrupted": interrupted,
        "options": dict(options),
        "client": {"machine": dict(machine), "load": load},
        "server": dict(server),
        "fleet": {"name": fleet.name, "gpus": fleet.gpus, "cores": fleet.cores,
                  "per_hour": fleet.per_hour, "currency": fleet.currency},
        "dropped_turns": driver.dropped_turns,
        "unfinished": driver.started - len(samples),
        "figures": found,
        "timeline": timeline(samples, driver.ticks),
        "itl_quantiles_ms": _quantiles(
            [gap for s in samples if s.ok and not s.warmup for gap in s.gaps]
        ),
        "columns": list(COLUMNS),
        "requests": [_row(sample) for sample in samples],
    }  # fmt: skip


def _quantiles(values: Sequence[float]) -> list[float]:
    """Evenly spread over the sorted values, the smallest and the largest among them."""
    ordered = sorted(values)
    count = min(len(ordered), _ITL_POINTS)
    if count < 2:
        return [round(1e3 * value, 4) for value in ordered]
    step = (len(ordered) - 1) / (count - 1)
    return [round(1e3 * ordered[round(i * step)], 4) for i in range(count)]


def _row(sample: Sample) -> list[Any]:
    def short(value: float | None) -> float | None:
        return None if value is None else round(value, 5)

    return [
        sample.session, sample.turn, short(sample.due), short(sample.sent), short(sample.first),
        short(sample.last), short(sample.end), sample.prompt_tokens, sample.tokens,
        sample.usage.host_tokens if sample.usage is not None else 0,
        short(max(sample.gaps, default=None)), int(sample.warmup),
        f"{sample.code} {sample.reason}".strip(),
    ]  # fmt: skip


def timeline(samples: Sequence[Sample], ticks: Counter[int]) -> dict[str, Any]:
    """Per bucket: requests that were due, that ended and that failed, tokens, and how many were
    under way in its middle."""
    end = max((sample.end for sample in samples), default=0.0)
    every = max(round(end / MAX_BARS / TICK_SECONDS + 0.5), 5)
    width, count = every * TICK_SECONDS, int(end / (every * TICK_SECONDS)) + 1
    rows: dict[str, list[float]] = {
        name: [0.0] * count for name in ("due", "ended", "failed", "tokens", "under_way")
    }
    changes: list[tuple[float, int]] = []
    for sample in samples:
        rows["due"][int(sample.due / width)] += 1
        rows["ended" if sample.ok else "failed"][int(sample.end / width)] += 1
        changes += [(sample.sent, 1), (sample.end, -1)]
    for tick, tokens in ticks.items():
        if tick // every < count:  # tokens of requests that never ended may be later
            rows["tokens"][tick // every] += tokens
    changes.sort()
    live = at = 0
    for bucket in range(count):
        while at < len(changes) and changes[at][0] <= (bucket + 0.5) * width:
            live += changes[at][1]
            at += 1
        rows["under_way"][bucket] = live
    return {"bucket_seconds": round(width, 3), **rows}


def write(result: Mapping[str, Any], path: Path) -> None:
    """Rows one a line, so that files can be compared."""
    rows = ",\n".join(json.dumps(row) for row in result["requests"])
    text = json.dumps({**result, "requests": "@"}, indent=1)
    path.write_text(text.replace('"requests": "@"', f'"requests": [\n{rows}\n]'))


def read(path: str) -> dict[str, Any]:
    """ValueError unless it is the result of a run."""
    try:
        found = from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a result of neo bench ({SCHEMA})")
    return found
