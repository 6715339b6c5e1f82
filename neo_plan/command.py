"""`neo plan` behind its flags, which `neo_client.commands.plan` defines."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from neo_client.prices import PriceFile, read_prices
from neo_common.model_spec import ModelSpec
from neo_plan.advice import Advice, advise
from neo_plan.demand import demand_of
from neo_plan.fleet import FleetWishes, fleet_row
from neo_plan.node import Sizes, make_node, read_model
from neo_plan.report import answer, fleet_table, losers
from neo_plan.search import Found, Goal, Kind, Search
from neo_plan.simulator.profile import read_profile

EXAMPLE = Path(__file__).parent / "prices-example.yaml"
DEFAULT_TARGETS = {"ttft": 2000.0, "tpot": 100.0}


def plan(arguments: argparse.Namespace) -> int:
    """Raises ValueError for what cannot be."""
    _check(arguments)
    prices = read_prices(arguments.prices or str(EXAMPLE))
    spec = read_model(arguments.model)
    kinds = kinds_of(arguments, prices, spec)
    demand, left_out = demand_of(
        arguments.rate, arguments.workload, arguments.trace, arguments.seed, spec.max_context_tokens
    )
    goal = Goal(
        dict(arguments.target) or DEFAULT_TARGETS,
        arguments.share,
        arguments.requests,
        arguments.zones,
    )
    search = Search(demand, goal, (lambda _: None) if arguments.quiet else _say)
    found = search.run(kinds)
    best = found[0] if found and found[0].replicas else None
    advice = advise(search, best) if best is not None else None
    console = Console()
    if left_out:
        console.print(f"[yellow]{left_out} requests of the trace are beyond the model's context[/]")
    if best is not None and advice is not None:
        console.print(answer(best, advice, demand, goal, prices), highlight=False)
    console.print(losers(found, prices), highlight=False)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_plain(arguments, found, advice, prices), indent=1))
    if best is None:
        print("neo plan: no kind of machine holds the targets", file=sys.stderr)
    return 0 if best is not None else 1


def fleet(arguments: argparse.Namespace) -> int:
    """Raises ValueError for what cannot be."""
    wishes = FleetWishes(
        node_rate=arguments.node_rate,
        seconds=arguments.seconds,
        slots=arguments.node_slots,
        output_tokens=arguments.output_tokens,
        router_messages=arguments.router_messages,
        interval_ms=arguments.interval_ms,
        zones=arguments.lost_zones,
    )
    wishes.validate()
    Console().print(fleet_table([fleet_row(wishes, nodes) for nodes in arguments.nodes], wishes))
    return 0


def _say(line: str) -> None:
    print(f"neo plan: {line}", file=sys.stderr, flush=True)


def _check(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.share <= 1:
        raise ValueError("share must be more than 0 and at most 1")
    if not 0 < arguments.gpu_memory_utilization <= 1:
        raise ValueError("gpu-memory-utilization must be more than 0 and at most 1")
    least = {"zones": 1, "requests": 20, "max_batch_tokens": 1, "max_running_requests": 1}
    for name, limit in least.items():
        if getattr(arguments, name) < limit:
            raise ValueError(f"{name.replace('_', '-')} must be at least {limit}")


def kinds_of(arguments: argparse.Namespace, prices: PriceFile, spec: ModelSpec) -> list[Kind]:
    """Every machine that was asked for, with offloading and without."""
    unknown = [name for name in arguments.machine if name not in prices.machines]
    if unknown:
        raise ValueError(f"machine {unknown[0]!r} is not in the price file")
    sizes = Sizes(
        arguments.max_batch_tokens, arguments.max_running_requests,
        arguments.gpu_memory_utilization, arguments.host_kv_dtype == "int8",
    )  # fmt: skip
    ways = {"both": (False, True), "on": (True,), "off": (False,)}[arguments.offload]
    kinds = []
    for name in arguments.machine or prices.machines:
        price = prices.machines[name]
        if price.gpus != 1:
            raise ValueError(f"machine {name!r} has {price.gpus} GPUs; plans are for 1 each")
        if not price.gpu:
            raise ValueError(f"machine {name!r} does not say which profile its gpu is")
        profile = read_profile(price.gpu if "/" in price.gpu else f"{price.gpu}.json")
        for offload in ways:
            node = make_node(
                profile, spec, cores=price.cores, host_gib=price.host_gib, offload=offload,
                sizes=sizes,
            )  # fmt: skip
            if offload and not node.host_blocks:
                continue  # too little memory for a host tier
            kinds.append(Kind(name, price, node))
    return kinds


def _plain(
    arguments: argparse.Namespace, found: list[Found], advice: Advice | None, prices: PriceFile
) -> dict[str, Any]:
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in sorted(vars(arguments).items())
        if name not in ("run", "function", "command", "action", "quiet", "json")
    }
    return {
        "options": options,
        "prices": {"note": prices.note, "currency": prices.currency},
        "kinds": [_row(each) for each in found],
        "advice": asdict(advice) if advice is not None else None,
    }


def _row(found: Found) -> dict[str, Any]:
    kind = found.kind
    return {
        "machine": kind.name,
        "offload": kind.offloads,
        "profile": kind.node.profile.about,
        "gpu_blocks": kind.node.gpu_blocks,
        "host_blocks": kind.node.host_blocks,
        "replicas": found.total,
        "replicas_that_hold": found.replicas,
        "per_hour": round(found.per_hour, 4),
        "capacity_requests_per_second": round(found.capacity, 4),
        "trial": asdict(found.trial) if found.trial is not None else None,
        "one_less": asdict(found.before) if found.before is not None else None,
        "reason": found.reason,
    }
