"""Every process, hit in every way at every moment, with the real processes: what clients get, that
the others go on, and that nothing is left behind. docs/guarantees.md says it in words."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch

from protos.neo.v1 import engine_pb2, router_pb2
from tests.fault.cells import CELLS, OK, TELLING, Cell, End, How
from tests.support.census import pools
from tests.support.crash import (
    CHUNK_TOKENS,
    JOBS,
    WAIT_SECONDS,
    System,
    When,
    Who,
    bring_to,
    core_of,
    live_requests,
    metric,
    running_system,
    strike,
    until_load,
)
from tests.support.load import Answer, Stream
from tests.support.memory_limit import memory_limit
from tests.support.models import greedy_tokens, reference_model
from tests.support.stack import Service, stack_model

HOLD_SECONDS = 0.2
"""Of a pause; each deadline of the system is ten times as long at least."""
CALL_SECONDS = 5.0
"""A call's own deadline."""

pytestmark = pytest.mark.timeout(600)  # more than any wait within


class Lab:
    """At most one running system: that of the cell before, as long as the configuration suits."""

    def __init__(self, root: Path) -> None:
        self.model = stack_model(root / "m")
        self._root = root
        reference = reference_model(self.model)
        self.golden = {
            job.prompt: greedy_tokens(reference, list(job.prompt), job.output_tokens)
            for job in JOBS.values()
        }
        self._config: dict[str, object] = {}
        self._numbers = itertools.count()
        self._exits = ExitStack()
        self._system: System | None = None

    async def system(self, cell: Cell) -> System:
        """One that serves, with its baseline taken."""
        if self._system is None or self._config != cell.config:
            self.close()
            directory = self._root / f"s{next(self._numbers)}"
            directory.mkdir()
            self._config = cell.config
            self._system = self._exits.enter_context(
                running_system(directory, self.model, **cell.config)
            )
            await self._system.ready()
            await asyncio.gather(*(self._system.stream(name).task for name in JOBS))
            self._system.baseline = await self._system.settle()
        return self._system

    def forget(self) -> None:
        """The system is not as it should be; the next cell gets a new one."""
        self._config = {}

    def close(self) -> None:
        self._system = None
        self._exits.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    torch.set_num_threads(1)  # the system needs the other cores
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.close()


@dataclass
class Before:
    """Of the engine that is to be hit."""

    load: engine_pb2.LoadSnapshot
    asked_tokens: int
    prefilled: float
    void: float
    pools: set[int]


async def look(system: System) -> Before:
    load = await until_load(system.engine, lambda load: True)
    prefilled = metric(system.engine, "neo_prefill_tokens_total")
    void = metric(system.engine, "neo_void_rows_total")
    return Before(load, system.asked_tokens, prefilled, void, pools(core_of(system.engine)))


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=cell.name, marks=() if cell.name in TELLING else (pytest.mark.slow,))
        for cell in CELLS
    ],
)
async def test_cell(lab: Lab, cell: Cell) -> None:
    system = await lab.system(cell)
    try:
        await run_cell(lab, system, cell)
    except BaseException:
        lab.forget()
        raise


async def run_cell(lab: Lab, system: System, cell: Cell) -> None:
    before = await look(system)
    late = CALL_SECONDS if (cell.who, cell.how) == (Who.ROUTER, How.HANG) else None
    streams = await bring_to(system, cell.when, cell.who, late)
    await hit(system, cell)
    await outage(lab, system, cell, streams)
    if cell.row.exit is None:
        strike(system, cell.who, signal.SIGCONT)
    else:
        service = system.service(cell.who)
        service.start()
        await asyncio.to_thread(service.wait_serving)
    answers = [await runs(lab, stream, cell.ends(name)) for name, stream in streams.items()]
    await drained(system, cell)
    await system.ready()
    if cell.who is Who.CPU:  # what is on the host is kept or lost
        assert not any(answer.usage and answer.usage.recomputations for answer in answers)
        if not cell.short_lease and cell.when is not When.DRAIN:
            await kept_its_kv(system, before, cell)
    await serves(lab, system, cell)
    await system.settle(system.baseline)


async def hit(system: System, cell: Cell) -> None:
    if cell.how is How.OOM:
        pid = system.pid(cell.who)
        with memory_limit() as limit:
            limit.starve(pid)
            await system.provoke(cell.who, pid)
            assert limit.kills == 1
        return
    number = {
        How.TERM: signal.SIGTERM, How.KILL: signal.SIGKILL, How.GONE: signal.SIGKILL,
    }.get(cell.how, signal.SIGSTOP)  # fmt: skip
    strike(system, cell.who, number)


async def outage(lab: Lab, system: System, cell: Cell, streams: Mapping[str, Stream]) -> None:
    """Until it is what the cell asks for; all others go on meanwhile."""
    if cell.how is How.PAUSE:
        await asyncio.sleep(HOLD_SECONDS)
        return
    if cell.row.exit is not None:
        service = system.service(cell.who)
        assert await asyncio.to_thread(service.wait_exit, WAIT_SECONDS) == cell.exit
    if cell.row.exit is None or cell.how is How.GONE:
        await noticed(system, cell, streams)
    # Whoever needs nothing of the one that is away comes to its end before that is back.
    apart = "gpu short" if cell.who is Who.CPU else "host short"
    await runs(lab, system.stream(apart, system.neighbour), (OK,))
    for name, stream in streams.items():
        if not cell.needs(name):
            await runs(lab, stream, (OK,))
    if cell.when is not When.DRAIN:
        await refused(lab, system, cell)


async def noticed(system: System, cell: Cell, streams: Mapping[str, Stream]) -> None:
    """Until a deadline has passed that somebody has for the one that does not answer."""
    if cell.who is Who.ROUTER:
        assert (await streams["late"].task).error is grpc.StatusCode.DEADLINE_EXCEEDED
        # Its KV is free by the engine's own clock: the router can tell it nothing.
        others = len(streams.keys() - {"beside", "late"})
        await until_load(system.engine, lambda load: live_requests(load) <= others)
    elif cell.who is Who.FRONT:
        await system.until_backend(router_pb2.BACKEND_STATE_DOWN)
    elif cell.who is Who.CORE:
        await until_load(
            system.neighbour, lambda _: metric(system.stack.cpu, "neo_host_sessions") == 1
        )
    else:
        state = "lost" if cell.short_lease else "degraded"
        await until_tier(system.neighbour, state)
        if cell.when is not When.DRAIN:  # else it may have ended already
            await until_tier(system.engine, state)


async def until_tier(engine: Service, state: str) -> None:
    await until_load(engine, lambda _: metric(engine, "neo_host_tier_state", state=state) == 1)


async def refused(lab: Lab, system: System, cell: Cell) -> None:
    """What a new call gets meanwhile."""
    if cell.who in (Who.CORE, Who.FRONT) and cell.row.exit is not None:
        await system.until_backend(router_pb2.BACKEND_STATE_DOWN)
    if cell.who in (Who.CORE, Who.ROUTER) and cell.row.exit is None:
        return  # it waits like the others
    if cell.who is not Who.CPU or cell.mode == "auto":  # which keeps to the host whom it is told to
        await runs(lab, system.stream("gpu short"), (cell.row.refused,))
        return
    answer = await runs(lab, system.stream("host short"), (OK,))
    assert answer.usage is not None
    assert answer.usage.host_tokens == 0


async def runs(lab: Lab, stream: Stream, ends: tuple[End, ...]) -> Answer:
    """It ends in one of these ways, and no token is lost, doubled or wrong."""
    answer = await stream.task
    end: End = (answer.error, answer.reason)
    assert end in ends, f"{end} after {len(answer.tokens)} tokens"
    golden = lab.golden[stream.job.prompt]
    assert answer.tokens == golden[: len(answer.tokens)]
    if end == OK:
        assert len(answer.tokens) == len(golden)
    return answer


async def kept_its_kv(system: System, before: Before, cell: Cell) -> None:
    """Nothing was computed twice but chunks that the cpu_service had in hand; its memory is the
    same."""
    assert pools(core_of(system.engine)) == before.pools
    asked = before.prefilled + system.asked_tokens - before.asked_tokens
    in_hand = 2 * CHUNK_TOKENS if cell.when is When.PREFILL and cell.how is not How.PAUSE else 0
    # Counters come ten times a second at most. A prompt's last token may be a row of its own.
    load = await until_load(
        system.engine,
        lambda _: metric(system.engine, "neo_prefill_tokens_total") >= asked - len(JOBS),
    )
    assert metric(system.engine, "neo_prefill_tokens_total") <= asked + in_hand
    assert metric(system.engine, "neo_recomputed_tokens_total") == 0
    assert load.recomputations_total == before.load.recomputations_total
    if cell.how is How.PAUSE:
        assert metric(system.engine, "neo_void_rows_total") == before.void


async def drained(system: System, cell: Cell) -> None:
    """The service that was told to end has ended well, unless the hit has ended it before."""
    service = system.stack.router if cell.who is Who.ROUTER else system.engine
    hit = cell.row.exit is not None and service is system.service(cell.who)
    if cell.when is When.DRAIN and not hit:
        assert await asyncio.to_thread(service.wait_exit, WAIT_SECONDS) == 0


async def serves(lab: Lab, system: System, cell: Cell) -> None:
    """All is as before."""
    for name in ("host short", "gpu short"):
        answer = await runs(lab, system.stream(name), (OK,))
        assert answer.usage is not None
        if name == "host short" and (cell.mode != "auto" or cell.pinned):
            assert answer.usage.host_tokens > 0
