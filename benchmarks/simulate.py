"""Throughput and latency of the engine on a machine that is only a profile: no GPU, no weights.

    python -m benchmarks.simulate --profile h100-16c.json --model llama3-8b --gpu-kv-blocks 1650 \
        --workload 1000x200 --requests 300

Runs the engine's own loop and scheduler (`gpu_service.engine.core`) with a fake clock; a sweep
takes what `neo_plan.simulator.machine` says. One line a workload. docs/scheduling.md has more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_service.model.spec import read_spec
from gpu_service.pipeline.cuda.shapes import shape_table
from gpu_service.pipeline.device_kv import without_staging
from gpu_service.scheduling.limits import OFFLOAD_POLICIES, SchedulerLimits
from neo_client.workloads import read_workload
from neo_client.workloads.arrivals import poisson
from neo_plan.catalog import model_folder
from neo_plan.simulator.figures import figures
from neo_plan.simulator.machine import Machine
from neo_plan.simulator.profile import read_profile
from neo_plan.simulator.run import simulate

HOST_ROWS = 16
"""Most host rows that start in a sweep, as in `gpu_service.pipeline.cuda.forward`, which imports
Triton."""

CAPTURED = ("auto", "deferred")
"""Modes whose host rows are in captured sweeps."""


def open_machine(args: argparse.Namespace) -> Machine:
    """The profile, for the model that was asked for."""
    profile = read_profile(args.profile)
    with model_folder(profile.model) as folder:
        measured = read_spec(folder)
    with model_folder(args.model) as folder:
        spec = read_spec(folder)
    max_running = min(args.max_running_requests, args.max_batch_tokens)
    table = shape_table(max_running, args.max_batch_tokens)
    device_deals = args.offload_mode in CAPTURED
    return Machine(profile, measured, spec, table, args.host_kv_dtype == "int8", device_deals)


def limits_of(args: argparse.Namespace, machine: Machine) -> SchedulerLimits:
    """As `gpu_service.engine.build` makes them on a CUDA device."""
    streams = args.streamed_kv_blocks if args.offload_mode in CAPTURED else 0
    gpu_blocks = without_staging(args.gpu_kv_blocks, streams, machine.spec.layers)
    largest = max(gpu_blocks, args.host_kv_blocks) * args.block_tokens
    deferred = args.offload_mode in CAPTURED
    return SchedulerLimits(
        gpu_blocks=gpu_blocks,
        host_blocks=args.host_kv_blocks,
        block_tokens=args.block_tokens,
        max_context_tokens=min(machine.spec.max_context_tokens, largest),
        max_batch_tokens=args.max_batch_tokens,
        max_running=args.max_running_requests,
        max_waiting_requests=1 << 20,
        offload=args.offload,
        cohorts=machine.spec.layers + 1 if deferred else 0,
        cohort_rows=HOST_ROWS if deferred else 0,
        streamed_blocks=streams,
        host_prefill=not deferred or streams > 0,
        staged_prompts=streams > 0,
        asymmetric=args.offload_mode == "asymmetric",
        inline=False,
        auto=args.offload_mode == "auto",
    )


def run(args: argparse.Namespace, workload: str) -> dict[str, Any]:
    """Figures of one workload. ValueError if it cannot be served."""
    if args.requests < 1:
        raise ValueError("requests must be at least 1")
    machine = open_machine(args)
    lengths = read_workload(workload, args.requests, args.seed)
    arrivals = [0.0] * len(lengths)
    if args.arrivals == "poisson":
        arrivals = poisson(len(lengths), args.rate, args.seed)
    began = time.perf_counter()
    found = figures(simulate(machine, limits_of(args, machine), lengths, arrivals))
    return {**found, "seconds_to_simulate": round(time.perf_counter() - began, 2)}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--profile", default="h100-16c.json", help="of neo_plan/profiles, or a path")
    made.add_argument("--model", default="llama3-8b", help="of neo_plan/models, or a path")
    made.add_argument("--gpu-kv-blocks", type=int, required=True)
    made.add_argument("--host-kv-blocks", type=int, default=0)
    made.add_argument("--host-kv-dtype", choices=("auto", "int8"), default="auto")
    made.add_argument("--offload", choices=OFFLOAD_POLICIES, default="auto")
    made.add_argument(
        "--offload-mode", choices=("auto", "inline", "deferred", "asymmetric"), default="auto"
    )
    made.add_argument("--streamed-kv-blocks", type=int, default=0)
    made.add_argument("--block-tokens", type=int, default=16)
    made.add_argument("--max-batch-tokens", type=int, default=8192)
    made.add_argument("--max-running-requests", type=int, default=256)
    made.add_argument("--workload", action="append", help="INxOUT or lengths; repeatable")
    made.add_argument("--requests", type=int, default=300)
    made.add_argument("--arrivals", choices=("at-once", "poisson"), default="at-once")
    made.add_argument("--rate", type=float, default=1.0, help="requests a second (poisson)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write all figures here")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    args = options.parse_args(argv)
    found = {}
    for name in args.workload or ["1000x200"]:
        try:
            found[name] = run(args, name)
        except ValueError as error:
            options.error(str(error))
        print(f"{args.model} {name}: {json.dumps(found[name])}", flush=True)
    if args.json:
        given = {k: str(v) for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"options": given, "figures": found}, indent=1))


if __name__ == "__main__":
    main()
