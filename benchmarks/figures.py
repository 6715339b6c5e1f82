"""The two figures of NEO's paper (arXiv 2411.01142), measured on whatever machine this runs on.

    python -m benchmarks.figures --output figures                   this machine's engine
    python -m benchmarks.figures --simulate h100-16c.json --output figures

load_latency   mean latency for each output token, over the rate of requests that come (Poisson,
               lengths of OpenAI summarize comparisons, Llama-2-7B on a card like a T4), with a host
               tier and without
gain           throughput with a host tier over that without, by output length (1,000 tokens in;
               Llama-3-8B on a card like an A10G), for several numbers of the host's threads

Each as JSON and CSV, and as a plot (SVG) where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figure_plots import plot_gain, plot_load
from benchmarks.figure_runs import Case, RealRuns, Runs, SimulatedRuns
from neo_client.fingerprint import fingerprint
from neo_client.workloads import read_workload
from neo_client.workloads.arrivals import poisson

LOADS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.4, 1.8, 2.4, 3.0)
"""Rates of the first figure, as parts of what the GPU alone serves when all come at once."""


def load_latency(runs: Runs, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each rate and engine."""
    case = Case(
        args.load_model, args.load_gpu_kv_blocks, args.host_kv_gib, args.host_kv_dtype,
        args.max_running_requests,
    )  # fmt: skip
    lengths = read_workload("osc_lengths", args.requests)
    alone = runs.run(case, False, 0, lengths, [0.0] * len(lengths))
    highest = len(lengths) / alone.seconds
    rates = args.rate or [round(part * highest, 3) for part in LOADS]
    rows = []
    for rate in rates:
        arrivals = poisson(len(lengths), rate, args.seed)
        for offload in (False, True):
            outcome = runs.run(case, offload, 0, lengths, arrivals)
            row = {
                "rate": rate,
                "offload": "auto" if offload else "never",
                "mean_latency_seconds_per_token": round(statistics.mean(outcome.latencies), 5),
                "sustained": sustained(outcome.latencies),
                "seconds": round(outcome.seconds, 3),
            }
            print(f"load_latency {json.dumps(row)}", flush=True)
            rows.append(row)
    return rows


def sustained(latencies: Sequence[float]) -> bool:
    """Half a second a token at most, and the queue does not grow in the last half: its last
    quarter waits no longer than half as long again as the one before."""
    half = latencies[len(latencies) // 2 :]
    before, last = half[: len(half) // 2], half[len(half) // 2 :]
    grows = statistics.mean(last) > 1.5 * statistics.mean(before)
    return statistics.mean(latencies) <= 0.5 and not grows


def gain(runs: Runs, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each output length and number of threads."""
    case = Case(
        args.gain_model, args.gain_gpu_kv_blocks, args.host_kv_gib, args.host_kv_dtype,
        args.max_running_requests,
    )  # fmt: skip
    rows = []
    for output in args.outputs:
        lengths = read_workload(f"1000x{output}", args.requests, args.seed)
        at_once = [0.0] * len(lengths)
        alone = len(lengths) / runs.run(case, False, 0, lengths, at_once).seconds
        for threads in args.threads:
            offloaded = len(lengths) / runs.run(case, True, threads, lengths, at_once).seconds
            row = {
                "output_tokens": output,
                "threads": threads,
                "requests_per_second": round(offloaded, 4),
                "gpu_only_requests_per_second": round(alone, 4),
                "gain": round(offloaded / alone, 4),
            }
            print(f"gain {json.dumps(row)}", flush=True)
            rows.append(row)
    return rows


def write(rows: list[dict[str, Any]], args: argparse.Namespace, name: str) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    told = {
        "simulated": args.simulate,
        "machine": None if args.simulate else fingerprint(),
        "options": {key: str(value) for key, value in vars(args).items()},
        "rows": rows,
    }
    (args.output / f"{name}.json").write_text(json.dumps(told, indent=1))
    with (args.output / f"{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--simulate", metavar="PROFILE", default="", help="of neo_plan/profiles")
    made.add_argument("--figure", choices=("load_latency", "gain", "both"), default="both")
    made.add_argument("--output", type=Path, default=Path("figures"))
    made.add_argument("--requests", type=int, default=300)
    made.add_argument("--rate", type=floats, default=[], help="requests a second, by commas")
    made.add_argument("--outputs", type=integers, default=[50, 100, 200, 300, 400])
    made.add_argument(
        "--threads", type=integers, default=[2, 4, 8, 14], help="of the host, by commas"
    )
    made.add_argument("--load-model", default="llama2-7b")
    made.add_argument("--load-gpu-kv-blocks", type=int, default=54)
    made.add_argument("--gain-model", default="llama3-8b")
    made.add_argument("--gain-gpu-kv-blocks", type=int, default=1650)
    made.add_argument("--host-kv-gib", type=float, default=28.0)
    made.add_argument("--host-kv-dtype", default="auto")
    made.add_argument("--max-running-requests", type=int, default=384)
    made.add_argument("--device", default="auto", help="of the real engine")
    made.add_argument("--seed", type=int, default=0)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    args = options.parse_args(argv)
    runs: Runs = SimulatedRuns(args.simulate) if args.simulate else RealRuns(args.device)
    title = f"simulated, {args.simulate.removesuffix('.json')}" if args.simulate else ""
    figures = {"load_latency": (load_latency, plot_load), "gain": (gain, plot_gain)}
    for name, (measure, plot) in figures.items():
        if args.figure not in (name, "both"):
            continue
        try:
            rows = measure(runs, args)
        except ValueError as error:
            options.error(str(error))
        write(rows, args, name)
        path = args.output / f"{name}.svg"
        if not plot(rows, path, title):
            print("no plots: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    main()
