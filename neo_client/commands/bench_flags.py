"""Flags of `neo bench`, and what they come to."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from neo_client.bench.figures import TARGETS
from neo_client.bench.load import DEFAULT_REQUESTS, Wishes
from neo_client.commands.flags import add_connection, target_of
from neo_client.options import PLACEMENTS
from neo_client.prices import Fleet, fleet_of, read_prices

DEFAULT_CONCURRENCY = 8
EXIT_THRESHOLD = 3
DESCRIPTION = (
    "Sends requests to a server and measures what comes back. Open loop (--rate, --ramp, --trace): "
    "requests come when they are due, whatever the server does, and latencies count from then. "
    "Closed loop (--concurrency): a worker sends its next request when the last one has ended."
)


def add(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="load on a server: latencies, goodput, efficiency; compare runs",
        description=DESCRIPTION,
        epilog="Exit codes: 0 done, 1 every request failed or no server, 2 wrong usage, 3 a "
        "--fail-if holds, 130 interrupted (what had ended is reported). docs/benchmarking.md says "
        "what each figure means.",
        allow_abbrev=False,
    )
    add_connection(parser, "a router or a gpu_service")
    parser.add_argument("--model", default="", help="default: the server's default model")
    _add_arrivals(parser)
    _add_requests(parser)
    _add_results(parser)
    _add_efficiency(parser)
    return parser


def _add_arrivals(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("when requests come")
    way = group.add_mutually_exclusive_group()
    way.add_argument("--rate", type=float, metavar="N", help="so many a second, at random times")
    way.add_argument(
        "--ramp", type=_ramp, metavar="A:B",
        help="at random times, from A to B a second over --duration",
    )  # fmt: skip
    way.add_argument(
        "--trace", metavar="FILE",
        help="when a CSV trace says, with its lengths; azure_conv_2023 comes with neo",
    )  # fmt: skip
    way.add_argument(
        "--concurrency", type=int, metavar="N",
        help=f"closed loop of so many workers (default: {DEFAULT_CONCURRENCY})",
    )  # fmt: skip
    group.add_argument(
        "--burstiness", type=float, default=1.0, metavar="SHAPE",
        help="of --rate: gamma distributed gaps; below 1 in bursts, above 1 evener (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="a trace X times as fast (default: 1)"
    )
    group.add_argument(
        "--requests", type=int, metavar="N",
        help=f"sessions in all (default: {DEFAULT_REQUESTS}, or the whole trace or --prompts)",
    )  # fmt: skip
    group.add_argument(
        "--duration", type=float, metavar="SECONDS", help="begin no request after that"
    )
    group.add_argument(
        "--warmup", type=int, default=0, metavar="N",
        help="first sessions that are sent and left out of all figures (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--max-in-flight", type=int, default=4096, metavar="N",
        help="open loop: hold further sessions back, still counted from when they were due "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS",
        help="deadline of each request (default: %(default)g)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")


def _add_requests(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--workload", metavar="INxOUT|FILE",
        help="tokens of prompts and answers, each +-10%%, or a JSON file of [in, out]; osc_lengths "
        "comes with neo (default: the trace's, or 128x64)",
    )  # fmt: skip
    group.add_argument(
        "--prompts", metavar="FILE",
        help='JSON lines: {"text": "...", "max_tokens": 64}, or messages or token_ids for text',
    )  # fmt: skip
    group.add_argument(
        "--turns", type=int, default=1, metavar="N",
        help="requests of a session, each behind all that was said before (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--think", type=float, default=0.0, metavar="SECONDS",
        help="between an answer and the session's next turn (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--shared-prefix", type=_prefix, default=(0, 1), metavar="TOKENS[:K]",
        help="in front of every prompt, one of K different ones (default K: 1)",
    )  # fmt: skip
    group.add_argument(
        "--too-long", choices=("fail", "clip", "skip"), default="fail",
        help="requests beyond the server's context (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)"
    )
    group.add_argument(
        "--stop-at-eos", action="store_true",
        help="let answers end early; else their lengths are as asked for",
    )  # fmt: skip
    group.add_argument(
        "--token-ids-only", action="store_true", help="answers without text: no detokenizing"
    )
    group.add_argument("--placement", choices=tuple(PLACEMENTS), help="where requests may decode")
    group.add_argument("--priority", type=int, default=0, help="-100 to 100 (default: 0)")
    group.add_argument("--ttft-ms", type=float, help="target that the scheduler is told")
    group.add_argument("--tpot-ms", type=float, help="the same, for each further token")


def _add_results(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--target", action="append", default=[], type=target_of(TARGETS), metavar="NAME=MS",
        help=f"goodput: requests that meet all of these; NAME is {', '.join(TARGETS)} (the longest "
        "gap); repeatable",
    )  # fmt: skip
    group.add_argument(
        "--fail-if", action="append", default=[], metavar="CONDITION",
        help="exit with 3 when it holds, such as 'ttft_p99_ms>500' or 'goodput_share<0.95'; "
        "repeatable",
    )  # fmt: skip
    group.add_argument("--json", type=Path, metavar="FILE", help="write all figures and requests")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots")
    group.add_argument("--name", default="run", help="of the run in the report (default: run)")
    group.add_argument("--quiet", action="store_true", help="no progress on standard error")
    group.add_argument(
        "--metrics-url", action="append", default=[], metavar="URL",
        help="Prometheus page of a gpu_service, to compare its counts with ours; one for each "
        "server, repeatable",
    )  # fmt: skip
    group.add_argument(
        "--admin-address", default="", metavar="HOST:PORT",
        help="operators' listener, to say in the result what was measured (default: --address)",
    )  # fmt: skip


def _add_efficiency(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("efficiency: output tokens for what they took")
    group.add_argument("--gpus", type=float, metavar="N", help="GPUs behind the address")
    group.add_argument("--cores", type=float, metavar="N", help="cores behind the address")
    group.add_argument("--per-hour", type=float, metavar="PRICE", help="what they cost in all")
    group.add_argument(
        "--prices", metavar="FILE", help="machines and prices, instead (docs/planning.md)"
    )
    group.add_argument(
        "--machine", action="append", default=[], metavar="NAME",
        help="of that file, behind the address; repeat it for several",
    )  # fmt: skip


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError naming a flag whose value cannot be."""
    for name, least in (("concurrency", 1), ("max_in_flight", 1), ("warmup", 0), ("think", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"{name.replace('_', '-')} must be at least {least}")
    if arguments.timeout <= 0:
        raise ValueError("timeout must be positive")
    if arguments.seed < 0:
        raise ValueError("seed must be at least 0")


def wishes_of(arguments: argparse.Namespace) -> Wishes:
    tokens, count = arguments.shared_prefix
    return Wishes(
        workload=arguments.workload,
        trace=arguments.trace,
        prompts=arguments.prompts,
        requests=arguments.requests,
        duration=arguments.duration,
        rate=arguments.rate,
        burstiness=arguments.burstiness,
        ramp=arguments.ramp,
        speed=arguments.speed,
        turns=arguments.turns,
        prefix_tokens=tokens,
        prefixes=count,
        seed=arguments.seed,
    )


def targets_of(arguments: argparse.Namespace) -> dict[str, float]:
    return dict(arguments.target)


def fleet_from(arguments: argparse.Namespace) -> Fleet:
    """Raises ValueError."""
    said = (arguments.gpus, arguments.cores, arguments.per_hour)
    if not arguments.machine:
        if arguments.prices:
            raise ValueError("prices needs machine: which of them are behind the address")
        return Fleet(gpus=said[0], cores=said[1], per_hour=said[2])
    if not arguments.prices or any(value is not None for value in said):
        raise ValueError("machine needs prices, and excludes gpus, cores and per-hour")
    return fleet_of(read_prices(arguments.prices), Counter(arguments.machine))


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options that say what was measured, for the result; nothing about who measured it."""
    private = ("run", "command", "action", "token_file", "tls_ca", "tls_cert", "tls_key", "json",
               "html", "quiet")  # fmt: skip
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in sorted(vars(arguments).items())
        if name not in private
    }


def _ramp(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be A:B, requests a second, not {text!r}") from None


def _prefix(text: str) -> tuple[int, int]:
    tokens, _, count = text.partition(":")
    try:
        return int(tokens), int(count or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be TOKENS or TOKENS:K, not {text!r}") from None
