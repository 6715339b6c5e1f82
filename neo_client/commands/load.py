"""`neo load`: what the backends of a router, or one gpu_service, are doing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from neo_client.commands.flags import add_connection, connection_of
from neo_client.connect import Connection
from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import engine_pb2_grpc, router_pb2_grpc
from protos.neo.v1 import router_pb2 as router

COLUMNS = (
    "backend", "state", "running", "queue", "KV", "tok/s", "ms", "moved", "tier", "age s",
)  # fmt: skip
LEGEND = (
    "running: requests on GPU + host tier; KV: blocks in use, likewise; ms: of a sweep; moved: "
    "demotions/promotions; tier: the host tier's state; age: of the report"
)
ANSWER_SECONDS = 10.0
STYLES = {"up": "green", "suspect": "yellow", "draining": "cyan", "down": "red"}


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "load",
        help="live load table",
        description="Shows the load of a router's backends, or of one gpu_service, until Ctrl-C. "
        f"Columns: {LEGEND}.",
        allow_abbrev=False,
    )
    add_connection(parser, "a router's admin listener or a gpu_service")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument(
        "--interval", type=float, default=0.5, metavar="SECONDS",
        help="between updates, 0.01 to 60 (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not 0.01 <= arguments.interval <= 60:
        raise ValueError("interval must be 0.01 to 60 seconds")
    console = Console()
    interval_ms = round(arguments.interval * 1000)
    connection = connection_of(arguments)
    with connection.open() as channel:
        if arguments.once:
            console.print(table(next(reports(channel, connection, interval_ms, once=True))))
            return 0
        with Live(console=console, auto_refresh=False) as live:
            for backends in reports(channel, connection, interval_ms):
                live.update(table(backends), refresh=True)
    return 0


def reports(
    channel: grpc.Channel, connection: Connection, interval_ms: int, *, once: bool = False
) -> Iterator[Sequence[router.Backend]]:
    """The backends, again and again. A gpu_service counts as the one backend of itself."""
    limits: dict[str, Any] = {
        "timeout": ANSWER_SECONDS if once else None,
        "metadata": connection.metadata(),
    }
    watch: Any = router_pb2_grpc.RouterServiceStub(channel).WatchBackends
    call = watch(router.WatchBackendsRequest(interval_ms=interval_ms), **limits)
    try:
        for message in call:
            yield message.backends
        return
    except grpc.RpcError as error:
        status: Any = error
        if status.code() is not grpc.StatusCode.UNIMPLEMENTED:
            raise
    finally:
        call.cancel()
    watch = engine_pb2_grpc.EngineServiceStub(channel).WatchLoad
    call = watch(engine.WatchLoadRequest(interval_ms=interval_ms), **limits)
    try:
        for message in call:
            yield [
                router.Backend(
                    address=connection.address, state=state_of(message.load), load=message.load
                )
            ]
    finally:
        call.cancel()


def state_of(load: engine.LoadSnapshot) -> router.BackendState:
    if load.state == engine.ENGINE_STATE_SERVING:
        return router.BACKEND_STATE_UP
    if load.state == engine.ENGINE_STATE_DRAINING:
        return router.BACKEND_STATE_DRAINING
    return router.BACKEND_STATE_DOWN


def table(backends: Sequence[router.Backend]) -> Table:
    # Fits into 80 columns, since that is what a pipe has and many terminals; an address cut short
    # would be of no use to `neo drain`.
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in COLUMNS:
        shown.add_column(name, no_wrap=name in ("backend", "state"))
    for backend in backends:
        shown.add_row(*row(backend))
    problems = [f"{escape(b.address)}: {escape(b.problem)}" for b in backends if b.problem]
    if problems:
        shown.caption, shown.caption_justify = "\n".join(problems), "left"
    return shown


def row(backend: router.Backend) -> list[str]:
    """Cells of one backend, as many as `COLUMNS`."""
    state = router.BackendState.Name(backend.state).removeprefix("BACKEND_STATE_").lower()
    styled = f"[{STYLES.get(state, 'white')}]{state}[/]"
    if not backend.HasField("load"):
        return [backend.address, styled, *["-"] * (len(COLUMNS) - 2)]
    load = backend.load
    host_tier = engine.HostTierState.Name(load.host_tier_state).removeprefix("HOST_TIER_STATE_")
    return [
        backend.address,
        styled,
        f"{load.gpu.running_requests}+{load.host.running_requests}",
        str(load.waiting_requests),
        f"{used(load.gpu)}+{used(load.host)}",
        f"{load.output_tokens_per_second:.1f}",
        f"{1000 * load.iteration_seconds:.1f}",
        f"{load.demotions_total}/{load.promotions_total}",
        host_tier.lower(),
        f"{backend.load_age_seconds:.1f}",
    ]


def used(tier: engine.TierLoad) -> str:
    """Part of a tier's blocks that is in use."""
    if tier.total_blocks == 0:
        return "-"
    taken = tier.total_blocks - tier.free_blocks
    return f"{100 * taken / tier.total_blocks:.0f}%"
