"""A result as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

SHOWN = ("mean", "p50", "p90", "p95", "p99", "max")
ROWS = (
    ("ttft", "TTFT"),
    ("sent_ttft", "TTFT from sending"),
    ("tpot", "TPOT"),
    ("itl", "ITL"),
    ("e2e", "E2E"),
    ("sent_e2e", "E2E from sending"),
    ("queue", "server's queue"),
)


def summary(result: Mapping[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [*headlines(result), latencies(result)]
    return Group(*parts)


def headlines(result: Mapping[str, Any]) -> list[str]:
    """What is worth a sentence; warnings last."""
    found, rates = result["figures"], result["figures"]["rates"]
    lines = [
        f"{rates['requests']} requests in {rates['seconds']:.1f} s: "
        f"{rates['requests_per_second']:.3g} req/s, "
        f"{rates['output_tokens_per_second']:.1f} output tok/s, "
        f"{rates['total_tokens_per_second']:.1f} with prompts; "
        f"{rates['host_token_share']:.0%} decoded on the host tier, "
        f"{rates['cached_prompt_share']:.0%} of prompt tokens cached"
    ]
    if "goodput" in found:
        goodput = found["goodput"]
        limits = ", ".join(f"{name} {value:g} ms" for name, value in goodput["targets_ms"].items())
        lines.append(
            f"goodput under {limits}: {goodput['goodput_share']:.1%}, "
            f"{goodput['goodput_per_second']:.3g} req/s"
        )
    if found["efficiency"]:
        lines.append(f"output tokens: {', '.join(efficiency(result))}")
    for text, count in found["failures"].items():
        lines.append(f"[red]{count} failed: {escape(text)}[/]")
    if result["unfinished"]:
        lines.append(f"[yellow]interrupted: {result['unfinished']} requests did not end[/]")
    for text in result["client"]["load"]["limits"]:
        lines.append(f"[yellow]the load generator was at its limit: {escape(text)}[/]")
    if "agreement_problem" in result["server"]:
        lines.append(f"[yellow]not compared: {escape(result['server']['agreement_problem'])}[/]")
    for row in disagreements(result):
        lines.append(f"[yellow]{escape(row)}[/]")
    return lines


def efficiency(result: Mapping[str, Any]) -> list[str]:
    fleet = result["fleet"]
    words = {
        "tokens_per_gpu_second": "per GPU-second",
        "tokens_per_core_second": "per core-second",
        "tokens_per_usd": f"per {fleet['currency']}",
    }
    found = result["figures"]["efficiency"]
    return [f"{value:,.1f} {words[name]}" for name, value in found.items()]


def disagreements(result: Mapping[str, Any], percent: float = 2.0) -> list[str]:
    return [
        f"the server counts otherwise: {row['what']} {row['client']:g} here, "
        f"{row['server']:g} there"
        for row in result["server"].get("agreement", [])
        if row["difference_percent"] is None or abs(row["difference_percent"]) > percent
    ]


def latencies(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
    table.add_column("ms")
    for name in SHOWN:
        table.add_column(name, justify="right")
    found = result["figures"]["latencies_ms"]
    for name, label in ROWS:
        if found[name]:
            table.add_row(label, *cells(found[name]))
    return table


def cells(values: Mapping[str, float], names: Sequence[str] = SHOWN) -> list[str]:
    return [number(values[name]) for name in names]


def number(value: float) -> str:
    """Three digits at least, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
