"""`neo plan`: how many of which machines. What it computes with is `neo_plan`, which needs the
engine's packages; the client itself does not."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from neo_client.commands.flags import target_of

TARGETS = ("ttft", "tpot", "e2e")
DESCRIPTION = (
    "Simulates a replica of each kind of machine in a price file with the engine's own scheduler, "
    "and finds the fewest replicas that hold the targets, with and without offloading to the host."
)


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="capacity planning: the cheapest machines that hold the targets",
        description=DESCRIPTION,
        epilog="Exit codes: 0 done, 1 no kind of machine holds the targets, 2 wrong usage. "
        "docs/planning.md has the model behind it and how far it can be trusted.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", default="llama3-8b",
        help="llama2-7b, llama3-8b, llama3-70b or a path with config.json (default: %(default)s)",
    )  # fmt: skip
    _add_demand(parser)
    _add_machines(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    actions = parser.add_subparsers(
        dest="action", required=False, metavar="ACTION", help="instead of a plan"
    )
    _add_fleet(actions)
    parser.set_defaults(run=run, function="plan")


def _add_demand(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("demand and targets")
    group.add_argument(
        "--rate", type=float, metavar="N",
        help="requests a second of all users; a trace is sped up to it (default: the trace's own)",
    )  # fmt: skip
    group.add_argument(
        "--workload", default="1000x200", metavar="INxOUT|FILE",
        help="tokens of prompts and answers, or a JSON file of [in, out] (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--trace", metavar="FILE",
        help="CSV trace with lengths instead; azure_conv_2023 comes with neo",
    )  # fmt: skip
    group.add_argument(
        "--target", action="append", default=[], type=target_of(TARGETS), metavar="NAME=MS",
        help=f"{', '.join(TARGETS)}; repeatable (default: ttft=2000 and tpot=100)",
    )  # fmt: skip
    group.add_argument(
        "--share", type=float, default=0.95, metavar="PART",
        help="of requests that must meet all targets (default: %(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--zones", type=int, default=1, metavar="N",
        help="with one of so many zones lost the others hold the targets (default: 1, no spare)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    group.add_argument(
        "--requests", type=int, default=300, metavar="N",
        help="simulated per trial: more is steadier and slower (default: %(default)s)",
    )  # fmt: skip


def _add_machines(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machines")
    group.add_argument(
        "--prices", metavar="FILE",
        help="machines and prices, YAML (default: the example that comes with neo, whose prices "
        "are made up)",
    )  # fmt: skip
    group.add_argument(
        "--machine", action="append", default=[], metavar="NAME",
        help="only this one of the file; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--offload", choices=("both", "on", "off"), default="both",
        help="try machines with their host tier, without, or both (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--host-kv-dtype", choices=("auto", "int8"), default="auto",
        help="of the host tier's KV (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--max-batch-tokens", type=int, default=8192, help="(default: 8192)")
    group.add_argument("--max-running-requests", type=int, default=256, help="(default: 256)")
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="PART", help="(default: 0.9)"
    )


def _add_fleet(actions: Any) -> None:
    parser = actions.add_parser(
        "fleet",
        help="what 1 to 1,000 nodes ask of routers, reports and zones",
        description="A table by number of nodes: routers, the traffic of load reports, how evenly "
        "routers with reports of that age share requests out, and what the loss of a zone does.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--nodes", type=_numbers, default=(1, 3, 10, 30, 100, 300, 1000), metavar="N,N,...",
        help="(default: 1,3,10,30,100,300,1000)",
    )  # fmt: skip
    parser.add_argument(
        "--node-rate", type=float, default=16.0, metavar="N",
        help="requests a second of each node (default: 16)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="S",
        help="that a request takes on a node (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--output-tokens", type=int, default=200, metavar="N",
        help="of a request, a message each (default: 200)",
    )  # fmt: skip
    parser.add_argument(
        "--node-slots", type=int, default=66, metavar="N",
        help="requests that a node holds at once; more wait (default: 66)",
    )  # fmt: skip
    parser.add_argument(
        "--router-messages", type=float, default=8000.0, metavar="N",
        help="messages a second that a router relays with a core (default: 8000)",
    )  # fmt: skip
    parser.add_argument(
        "--interval-ms", type=int, default=200, metavar="MS",
        help="between load reports, as load_interval_ms (default: 200)",
    )  # fmt: skip
    parser.add_argument(
        "--lost-zones", type=int, default=3, metavar="N",
        help="zones that the nodes are spread over, of which one is lost (default: 3)",
    )  # fmt: skip
    parser.set_defaults(run=run, function="fleet")


def run(arguments: argparse.Namespace) -> int:
    try:
        # By name: nothing of the client may import the services, and this does.
        command: Any = importlib.import_module("neo_plan.command")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this needs the engine's packages ({error.name} is missing): "
            "pip install 'neo-serving[engine]'"
        ) from None
    return int(getattr(command, arguments.function)(arguments))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers of 1 or more, not {text!r}")
    return found
