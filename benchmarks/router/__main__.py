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

from benchmarks.fingerprint import fingerprint
from benchmarks.router.cases import CASES, FULL, SMALL, Figures
from benchmarks.router.processes import Cpus


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
            more = (Path(folder),) if name == "refusals" else ()
            results[name] = CASES[name](SMALL if args.small else FULL, cpus, *more)
            print(table({name: results[name]}), flush=True)
    if args.json:
        found = {
            "machine": fingerprint(),
            "options": vars(args) | {"json": None},
            "figures": results,
        }
        args.json.write_text(json.dumps(found, indent=1))


def table(results: dict[str, Figures]) -> str:
    lines = []
    for case, figures in results.items():
        for name, value in figures.items():
            shown = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
            lines.append(f"| {case} | {name} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
