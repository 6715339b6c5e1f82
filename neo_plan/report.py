"""A plan for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from neo_client.prices import PriceFile
from neo_plan.advice import Advice
from neo_plan.demand import Demand
from neo_plan.fleet import FleetRow, FleetWishes, as_rows
from neo_plan.search import Found, Goal, Kind
from neo_plan.trial import Trial


def answer(
    best: Found, advice: Advice, demand: Demand, goal: Goal, prices: PriceFile
) -> RenderableType:
    trial, kind = best.trial, best.kind
    assert trial is not None
    limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goal.targets.items())
    spare = f" ({best.replicas} hold the targets)" if advice.replicas > best.replicas else ""
    cost = 1e6 * best.per_hour / 3600 / (trial.tokens_per_second * best.replicas)
    lines = [
        f"[bold]{advice.replicas} x {kind.label}[/]{spare}, {advice.per_hour:g} {prices.currency} "
        f"an hour, for {demand.rate * demand.scale:g} requests/s of {escape(demand.workload)} with "
        f"{limits} for {goal.share:.0%}",
        sizes(kind),
        f"predicted: {trial.share:.1%} hold; TTFT p50/p99 {_pair(trial, 'ttft')} ms, TPOT "
        f"{_pair(trial, 'tpot')} ms; {_load(best, demand):.0%} of their capacity, attention "
        f"threads {trial.cpu_busy:.0%} busy, {trial.host_share:.0%} of tokens on the host; "
        f"{cost:.2f} {prices.currency} per million output tokens",
        f"one replica holds {advice.most_requests_per_second:.3g} requests/s, with some "
        f"{advice.most_in_system:.0f} in it; add one when each has {advice.scale_at:.0f}",
        "replicas by load: "
        + ", ".join(f"{load:g}x {count}" for load, count in advice.by_load.items()),
        f"[dim]{escape(kind.node.profile.about)}[/]",
        f"[dim]prices: {escape(prices.note or 'as in the file')}[/]",
        "",
    ]
    return Group(*lines)


def sizes(kind: Kind) -> str:
    node, price = kind.node, kind.price
    gpu, host = (n * node.sizes.block_tokens for n in (node.gpu_blocks, node.host_blocks))
    beside = f", {host:,} on the host" if kind.offloads else ""
    memory = f"{price.cores} cores, {price.host_gib:g} GiB"
    return f"each: {memory}; KV for {gpu:,} tokens on the GPU{beside}"


def _load(best: Found, demand: Demand) -> float:
    return demand.rate * demand.scale / best.replicas / best.capacity


def _pair(trial: Trial, name: str) -> str:
    found = trial.latencies[name]
    return f"{found['p50']:,.0f}/{found['p99']:,.0f}" if found else "-"


def losers(found: list[Found], prices: PriceFile) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("machine", "replicas", f"{prices.currency}/h", "GPU", "CPU", "why not"):
        right = name not in ("machine", "why not")
        table.add_column(name, justify="right" if right else "left")
    for each in found:
        trial = each.trial
        table.add_row(
            each.kind.label,
            str(each.total or "-"),
            f"{each.per_hour:.2f}" if each.replicas else "-",
            f"{trial.gpu_busy:.0%}" if trial else "-",
            f"{trial.cpu_busy:.0%}" if trial and each.kind.offloads else "-",
            escape(each.reason) or "the answer",
        )
    return table


FLEET_COLUMNS = (
    "nodes", "routers", "reports/s", "Mbit/s", "spread", "waited",
    "lost", "load", "waited", "p99 s",
)  # fmt: skip


def fleet_table(rows: list[FleetRow], wishes: FleetWishes) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in FLEET_COLUMNS:
        table.add_column(name, justify="right")
    for cells in as_rows(rows):
        table.add_row(*cells)
    about = (
        f"{wishes.node_rate:g} requests/s a node, {wishes.load:.0%} of its slots in use; a report "
        f"every {wishes.interval_ms} ms. reports/s: that each router takes in. spread: the fullest "
        f"node over the mean. waited: requests for a slot. lost: what one of {wishes.zones} zones "
        "had under way when it went, sent again at once; behind it how full the others are then, "
        "and how long requests wait."
    )
    return Group(about, table)
