"""`neo bench compare` and `neo bench report`: what earlier runs have left."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neo_client.bench import result as results
from neo_client.bench.compare import CONFIDENCE_PERCENT, Change, compare, differences
from neo_client.bench.figures import flat
from neo_client.bench.report.page import report
from neo_client.bench.summary import number
from neo_client.bench.thresholds import failures, parse
from neo_client.commands.bench_flags import EXIT_THRESHOLD

_STYLES = {"better": "green", "worse": "red", "unclear": "dim"}


def add(actions: Any) -> None:
    parser = actions.add_parser(
        "compare",
        help="two or more runs, against the first one",
        description="Shows what changed between runs, with intervals from their requests; machines "
        "by tokens per GPU-second, core-second and price.",
        epilog="Exit codes: 0 done, 2 wrong usage, 3 a --fail-if holds for a later run.",
        allow_abbrev=False,
    )
    parser.add_argument("before", metavar="A.json", help="result of neo bench --json")
    parser.add_argument("after", nargs="+", metavar="B.json", help="further ones")
    parser.add_argument(
        "--fail-if", action="append", default=[], metavar="CONDITION",
        help="exit with 3 when it holds: a figure, or its change, such as 'ttft_p99_ms>+10%%'; "
        "repeatable",
    )  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots")
    parser.set_defaults(run=run)
    again = actions.add_parser(
        "report",
        help="make the report of a run again",
        description="Writes the HTML report of a result of neo bench --json.",
        allow_abbrev=False,
    )
    again.add_argument("result", metavar="A.json", help="result of neo bench --json")
    again.add_argument("--html", type=Path, required=True, metavar="FILE", help="where to")
    again.set_defaults(run=run_report)


def named(paths: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Names are those of the files: they differ, and the caller knows them."""
    return [(Path(path).stem, results.read(path)) for path in paths]


def run_report(arguments: argparse.Namespace) -> int:
    arguments.html.write_text(report(named([arguments.result])), encoding="utf-8")
    return 0


def run(arguments: argparse.Namespace) -> int:
    thresholds = [parse(text, relative=True) for text in arguments.fail_if]
    first, *others = runs = named([arguments.before, *arguments.after])
    console = Console()
    failed = []
    for name, result in others:
        console.print(table(first[0], name, compare(first[1], result)), highlight=False)
        for line in differences(first[1], result):
            console.print(f"[yellow]they differ in {escape(line)}[/]", highlight=False)
        failed += [f"{name}: {text}" for text in failures(thresholds, flat(result), flat(first[1]))]
    if arguments.html is not None:
        arguments.html.write_text(report(runs), encoding="utf-8")
    for sentence in failed:
        print(f"neo bench: failed: {sentence}", file=sys.stderr)
    return EXIT_THRESHOLD if failed else 0


def table(before: str, after: str, changes: list[Change]) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    shown.add_column("")
    for name in (escape(before), escape(after), "change", f"{CONFIDENCE_PERCENT:g}% interval", ""):
        shown.add_column(name, justify="right")
    for change in changes:
        interval = change.interval
        shown.add_row(
            change.name,
            number(change.before),
            number(change.after),
            "" if change.percent is None else f"{change.percent:+.1f}%",
            "" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}%",
            f"[{_STYLES[change.verdict]}]{change.verdict}[/]" if change.verdict else "",
        )
    return shown
