"""What a router adds to each call, relays, holds and refuses.

    python -m benchmarks.router [--cases latency,relay] [--json FILE]

The router is pinned to the last allowed CPU, all else runs on the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.router import cases
from benchmarks.router.cases import FULL, NEED_FOLDER, SMALL, Figures
from benchmarks.router.http import over_http
from benchmarks.router.processes import Cpus
from neo_client.fingerprint import fingerprint

CASES = {**cases.CASES, "http": over_http}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.router",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--small", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    names = args.cases.split(",")
    if unknown := set(names) - CASES.keys():
        parser.error(f"no case {', '.join(sorted(unknown))}")
    cpus = Cpus.split()
    os.sched_setaffinity(0, cpus.others)
    results: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            more = (Path(folder),) if name in NEED_FOLDER else ()
            results[name] = CASES[name](SMALL if args.small else FULL, cpus, *more)
            print(table({name: results[name]}), flush=True)
    print(targets(results))
    if args.json:
        found = {
            "machine": fingerprint(),
            "options": vars(args) | {"json": None},
            "figures": results,
        }
        args.json.write_text(json.dumps(found, indent=1))


TARGETS = (
    ("latency", "router_added_p50_ms", "added to a unary call, p50", "<= 0.4 ms"),
    ("latency", "router_added_p99_ms", "added to a unary call, p99", "<= 1 ms"),
    ("relay", "ratio", "tokens per CPU second, times the plain proxy's", ">= 1.5"),
    ("relay", "router_tokens_per_second", "one-token messages, joined under load", ">= 20,000/s"),
    ("many", "streams", "streams at once", "5,000"),
    ("many", "growth", "memory while they are open, last quarter / first", "flat"),
    ("refusals", "p99_ms", "refusals under load, p99", "< 5 ms"),
    ("killed", "failed_without_token", "failed without a token when an engine is killed", "0"),
)
"""case, figure, what it is, what it should be on a quiet machine."""


def targets(results: dict[str, Figures]) -> str:
    lines = ["", "| what | target | measured |", "| --- | --- | --- |"]
    for case, figure, what, wanted in TARGETS:
        if case in results:
            lines.append(f"| {what} | {wanted} | {shown(results[case][figure])} |")
    return "\n".join(lines)


def shown(value: float) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


def table(results: dict[str, Figures]) -> str:
    lines = []
    for case, figures in results.items():
        for name, value in figures.items():
            lines.append(f"| {case} | {name} | {shown(value)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
