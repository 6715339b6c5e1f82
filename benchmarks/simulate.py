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

from gpu_service.scheduling.limits import OFFLOAD_POLICIES
from neo_client.workloads import read_workload
from neo_client.workloads.arrivals import poisson
from neo_plan.node import Node, Sizes, read_model
from neo_plan.simulator.figures import figures
from neo_plan.simulator.profile import read_profile
from neo_plan.simulator.run import simulate


def node_of(args: argparse.Namespace) -> Node:
    """The profile's machine, for the model that was asked for."""
    profile = read_profile(args.profile)
    sizes = Sizes(
        max_batch_tokens=args.max_batch_tokens,
        max_running_requests=args.max_running_requests,
        host_kv_int8=args.host_kv_dtype == "int8",
        offload_mode=args.offload_mode,
        streamed_kv_blocks=args.streamed_kv_blocks,
        block_tokens=args.block_tokens,
    )
    return Node(
        profile=profile,
        measured=read_model(profile.model),
        spec=read_model(args.model),
        sizes=sizes,
        gpu_blocks=args.gpu_kv_blocks,
        host_blocks=args.host_kv_blocks,
        offload=args.offload,
    )


def run(args: argparse.Namespace, workload: str) -> dict[str, Any]:
    """Figures of one workload. ValueError if it cannot be served."""
    if args.requests < 1:
        raise ValueError("requests must be at least 1")
    node = node_of(args)
    lengths = read_workload(workload, args.requests, args.seed)
    arrivals = [0.0] * len(lengths)
    if args.arrivals == "poisson":
        arrivals = poisson(len(lengths), args.rate, args.seed)
    began = time.perf_counter()
    found = figures(simulate(node.machine(), node.limits(), lengths, arrivals))
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
