"""The page: headlines, tables, plots, and what was measured on what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from neo_client.bench.compare import CONFIDENCE_PERCENT, Change, compare, differences
from neo_client.bench.figures import ABOUT
from neo_client.bench.report.plots import Runs, by_length, distributions, over_time
from neo_client.bench.report.style import STYLE
from neo_client.bench.summary import ROWS, SHOWN, cells, headlines, number

_MARKUP = re.compile(r"\[/?[a-z]*\]")
"""Of a terminal's colours."""


def report(runs: Runs) -> str:
    """One run, or several of which the first is what the others are compared with."""
    title = " and ".join(name for name, _ in runs)
    body = [f"<h1>neo bench: {escape(title)}</h1>", *(_head(name, run) for name, run in runs)]
    for name, result in runs[1:]:
        body.append(_comparison(runs[0], (name, result)))
    body += ["<h2>Latencies</h2>", *(_latencies(name, run, len(runs) > 1) for name, run in runs)]
    body += [_section("Distributions", distributions(runs))]
    body += [_section("Over time", over_time(runs))]
    body += [_section("By length", by_length(runs))]
    body += ["<h2>What was measured</h2>", *(_details(name, run) for name, run in runs)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>neo bench: {escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _section(title: str, plots: Sequence[str]) -> str:
    return f"<h2>{title}</h2><div class=plots>{''.join(plots)}</div>"


def _head(name: str, result: Mapping[str, Any]) -> str:
    rates, latencies = result["figures"]["rates"], result["figures"]["latencies_ms"]
    tiles = [
        (number(rates["requests_per_second"]), "requests/s"),
        (number(rates["output_tokens_per_second"]), "output tokens/s"),
    ]
    for key, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E")):
        if latencies[key]:
            values = f"{number(latencies[key]['p50'])} / {number(latencies[key]['p99'])}"
            tiles.append((values, f"{label} p50 / p99, ms"))
    if "goodput" in result["figures"]:
        goodput = result["figures"]["goodput"]
        tiles.append((f"{goodput['goodput_share']:.1%}", "goodput"))
    shown = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
    first, *others = [_MARKUP.sub("", line) for line in headlines(result)]
    notes = "".join(f"<li>{escape(line)}</li>" for line in others)
    when = escape(f"{name} · {result['started_at']} · {result['server'].get('model', '')}")
    return (
        f"<section class=run><p class=when>{when}</p><div class=tiles>{shown}</div>"
        f"<p>{escape(first)}</p>{f'<ul>{notes}</ul>' if notes else ''}</section>"
    )


def _comparison(before: tuple[str, Mapping[str, Any]], after: tuple[str, Mapping[str, Any]]) -> str:
    rows = "".join(_change(change) for change in compare(before[1], after[1]))
    unlike = "".join(f"<li>{escape(line)}</li>" for line in differences(before[1], after[1]))
    names = f"<th>{escape(before[0])}</th><th>{escape(after[0])}</th>"
    return (
        f"<h2>{escape(after[0])} against {escape(before[0])}</h2>"
        f"<table><tr><th></th>{names}<th>change</th><th>{CONFIDENCE_PERCENT:g}% interval</th>"
        f"<th></th></tr>{rows}</table>"
        "<p class=note>Intervals say how far the change could differ by chance of which requests "
        "were drawn. Requests that queue behind each other are not independent, and two runs on a "
        "busy machine differ by more: repeat runs before a decision.</p>"
        + (f"<p>The runs differ in:</p><ul>{unlike}</ul>" if unlike else "")
    )


def _change(change: Change) -> str:
    percent = "" if change.percent is None else f"{change.percent:+.1f}%"
    interval = ""
    if change.interval is not None:
        interval = f"{change.interval[0]:+.1f}% to {change.interval[1]:+.1f}%"
    return (
        f"<tr><td>{change.name}</td><td>{number(change.before)}</td><td>{number(change.after)}</td>"
        f"<td>{percent}</td><td>{interval}</td>"
        f'<td class="{change.verdict}">{change.verdict}</td></tr>'
    )


def _latencies(name: str, result: Mapping[str, Any], named: bool) -> str:
    found = result["figures"]["latencies_ms"]
    rows = "".join(
        f'<tr title="{escape(ABOUT[key])}"><td>{escape(label)}</td>'
        + "".join(f"<td>{value}</td>" for value in cells(found[key]))
        + f"<td>{found[key]['count']}</td></tr>"
        for key, label in ROWS
        if found[key]
    )
    heads = "".join(f"<th>{each}</th>" for each in SHOWN)
    caption = f"<caption>{escape(name)}</caption>" if named else ""
    return f"<table>{caption}<tr><th>ms</th>{heads}<th>count</th></tr>{rows}</table>"


def _details(name: str, result: Mapping[str, Any]) -> str:
    server = dict(result["server"])
    agreement = server.pop("agreement", [])
    parts = [
        ("Options", _pairs({k: v for k, v in result["options"].items() if _said(v)})),
        ("Client", _pairs({**result["client"]["machine"], **result["client"]["load"]})),
        ("Server", _pairs(_flatten(server))),
    ]
    if agreement:
        rows = "".join(
            f"<tr><td>{escape(row['what'])}</td><td>{row['client']:g}</td>"
            f"<td>{row['server']:g}</td><td>{_percent(row['difference_percent'])}</td></tr>"
            for row in agreement
        )
        heads = "<tr><th></th><th>here</th><th>server's metrics</th><th>difference</th></tr>"
        parts.append(("Agreement with the server, all requests", f"<table>{heads}{rows}</table>"))
    inner = "".join(f"<h3>{title}</h3>{text}" for title, text in parts)
    return f"<details><summary>{escape(name)}</summary>{inner}</details>"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}%"


def _said(value: Any) -> bool:
    return value not in (None, "", [], False)


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update({f"{name} {key}": each for key, each in value.items()})
        elif isinstance(value, list):
            found.update({f"{name} {i}": each for i, each in enumerate(value)})
        else:
            found[name] = value
    return found


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(name).replace('_', ' '))}</td>"
        f"<td class=text>{_value(value)}</td></tr>"
        for name, value in values.items()
    )
    return f"<table class=pairs>{rows}</table>"


def _value(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"<pre>{escape(text)}</pre>" if "\n" in text else escape(text)
