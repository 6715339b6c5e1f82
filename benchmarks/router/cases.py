"""The cases, each a function from options to figures."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from benchmarks.router import k6, load, processes
from benchmarks.router.processes import Cpus, Process

Figures = dict[str, Any]
MS = 1e3
OPENING = 64
"""Streams that wait for their first message, at most, while many are opened."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `small` is for a test that it runs at all."""

    rounds: int
    calls: int
    streams: int
    tokens: int
    many_streams: int
    many_seconds: float
    seconds: float


FULL = Sizes(5, 400, 64, 1000, 5000, 90.0, 8.0)
SMALL = Sizes(1, 5, 4, 20, 20, 0.5, 0.5)


def added_latency(sizes: Sizes, cpus: Cpus) -> Figures:
    """A unary call alone on an idle router, against the same without it, in turns."""
    with (
        processes.engines(1, [], cpus) as (engine,),
        processes.router([engine], [], cpus) as through,
        processes.proxy(engine, cpus) as plain,
    ):
        ways = {"direct": engine.address, "router": through.address, "proxy": plain.address}
        return asyncio.run(_added_latency(ways, sizes.calls * sizes.rounds))


async def _added_latency(ways: Mapping[str, str], calls: int) -> Figures:
    message = load.request(1)
    took: dict[str, list[float]] = {way: [] for way in ways}
    async with (
        load.channels(ways["direct"]) as (direct,),
        load.channels(ways["router"]) as (router,),
        load.channels(ways["proxy"]) as (proxy,),
    ):
        opened = {"direct": direct, "router": router, "proxy": proxy}
        for number in range(calls + 20):
            for way, channel in opened.items():
                seconds = await load.unary_seconds(channel, message)
                if number >= 20:  # the first ones warm up
                    took[way].append(seconds)
    figures: Figures = {}
    for way, values in took.items():
        for name, part in (("p50", 0.5), ("p99", 0.99)):
            figures[f"{way}_{name}_ms"] = load.percentile(values, part) * MS
    for way in ("router", "proxy"):
        for name in ("p50", "p99"):
            added = figures[f"{way}_{name}_ms"] - figures[f"direct_{name}_ms"]
            figures[f"{way}_added_{name}_ms"] = added
    return figures


def relayed(sizes: Sizes, cpus: Cpus) -> Figures:
    """One-token messages as fast as they are taken: through the router and the plain proxy, in
    turns. Counted per CPU second of the process in the middle."""
    rates: dict[str, list[float]] = {"router": [], "proxy": []}
    walls: dict[str, list[float]] = {"router": [], "proxy": []}
    with (
        processes.engines(1, [], cpus) as (engine,),
        processes.router([engine], [], cpus) as through,
        processes.proxy(engine, cpus) as plain,
    ):
        for process in (through, plain):
            asyncio.run(_relay(process, sizes.streams, sizes.tokens // 4))
        for _ in range(sizes.rounds):
            for way, process in (("router", through), ("proxy", plain)):
                tokens, cpu, wall = asyncio.run(_relay(process, sizes.streams, sizes.tokens))
                rates[way].append(tokens / max(cpu, 0.01))
                walls[way].append(tokens / wall)
    figures: Figures = {
        f"{way}_tokens_per_cpu_second": statistics.median(rates[way]) for way in rates
    }
    figures |= {f"{way}_tokens_per_second": statistics.median(walls[way]) for way in walls}
    figures["ratio"] = statistics.median(
        ours / theirs for ours, theirs in zip(rates["router"], rates["proxy"], strict=True)
    )
    return figures


async def _relay(process: Process, streams: int, tokens: int) -> tuple[int, float, float]:
    """Tokens, CPU seconds of the process, seconds."""
    async with load.channels(process.address, 2) as opened:
        began, busy = time.perf_counter(), process.cpu_seconds()
        done = await load.streams(opened, streams, tokens)
        wall, cpu = time.perf_counter() - began, process.cpu_seconds() - busy
    got = sum(each.tokens for each in done)
    assert got == streams * tokens, f"{got} tokens instead of {streams * tokens}"
    return got, cpu, wall


def offered(sizes: Sizes, cpus: Cpus, step_ms: float = 10.0) -> Figures:
    """Engines that go on whatever happens, and merge what a slow reader left: how many tokens come
    through, how late, in how many messages."""
    streams = sizes.streams * 4
    tokens = round(sizes.seconds * MS / step_ms)
    flags = ["--step-ms", str(step_ms), "--merge"]
    with (
        processes.engines(1, flags, cpus) as (engine,),
        processes.router([engine], [], cpus) as through,
    ):
        figures = asyncio.run(_offered(through, streams, tokens))
    figures["offered_tokens_per_second"] = streams * MS / step_ms
    figures["late_seconds"] = figures["seconds"] - tokens * step_ms / MS
    return figures


async def _offered(process: Process, streams: int, tokens: int) -> Figures:
    async with load.channels(process.address, 4) as opened:
        await load.streams(opened, 4, 1)
        began, busy = time.perf_counter(), process.cpu_seconds()
        done = await load.streams(opened, streams, tokens)
        wall, cpu = time.perf_counter() - began, process.cpu_seconds() - busy
    got, messages = sum(each.tokens for each in done), sum(each.messages for each in done)
    assert got == streams * tokens, f"{got} tokens instead of {streams * tokens}"
    return {
        "streams": streams,
        "seconds": wall,
        "tokens_per_second": got / wall,
        "tokens_per_cpu_second": got / max(cpu, 0.01),
        "messages_per_cpu_second": messages / max(cpu, 0.01),
        "tokens_per_message": got / messages,
        "router_cpu": cpu / wall,
    }


def many(sizes: Sizes, cpus: Cpus) -> Figures:
    """Slow streams, many at once: what the router holds for them, and whether that grows."""
    count = sizes.many_streams
    tokens = max(2, round(sizes.many_seconds / 2))
    flags = ["--step-ms", "2000" if count > 100 else "100"]
    with (
        processes.engines(1, flags, cpus) as (engine,),
        processes.router([engine], [], cpus) as through,
    ):
        return asyncio.run(_many(through, count, tokens))


async def _many(process: Process, count: int, tokens: int) -> Figures:
    async with load.channels(process.address, 4) as opened:
        await load.streams(opened, 8, 2)
        idle = process.resident_mib()
        began = time.perf_counter()
        running = asyncio.create_task(_opened_slowly(opened, count, tokens))
        resident = [(0.0, idle)]
        while not (await asyncio.wait([running], timeout=0.2))[0]:
            resident.append((time.perf_counter() - began, process.resident_mib()))
        done = await running
    codes = Counter(each.code.name for each in done)
    assert codes == {"OK": count}, f"streams ended with {codes}"
    assert sum(each.tokens for each in done) == count * tokens
    opened_by = max(each.first_at or 0.0 for each in done) - began
    until = min(each.ended_at for each in done) - began
    inside = [(at, mib) for at, mib in resident if opened_by < at < until] or resident
    fourth = max(1, len(inside) // 4)
    first = statistics.mean(mib for _, mib in inside[:fourth])
    last = statistics.mean(mib for _, mib in inside[-fourth:])
    return {
        "streams": count,
        "all_open_seconds": until - opened_by,
        "idle_mib": idle,
        "peak_mib": max(mib for _, mib in resident),
        "kib_per_stream": (max(mib for _, mib in inside) - idle) * 1024 / count,
        "first_quarter_mib": first,
        "last_quarter_mib": last,
        "growth": last / first,
    }


async def _opened_slowly(opened: Sequence[Any], count: int, tokens: int) -> list[load.Streamed]:
    """All at once would measure how fast calls are taken, not how many are held."""
    room = asyncio.Semaphore(OPENING)
    streams = []
    for number in range(count):
        await room.acquire()
        one = load.stream(opened[number % 4], tokens, f"s{number}", room.release)
        streams.append(asyncio.create_task(one))
    return await asyncio.gather(*streams)


def refusals(sizes: Sizes, cpus: Cpus, folder: Path) -> Figures:
    """Calls beyond what the tenants file allows, while streams go on: how fast they are refused.
    Sent at a steady pace, whether or not those before were answered."""
    tenants = folder / "tenants.yaml"
    tenants.write_text(f"max_running: {sizes.streams}\nmax_queued: 0\n")
    tokens = round((sizes.seconds + 60) * 50)
    readers = ["--streams", str(sizes.streams), "--tokens", str(tokens)]
    with (
        processes.engines(2, ["--step-ms", "20", "--merge"], cpus) as (engine, idle),
        processes.router([engine], ["--tenants", str(tenants)], cpus) as through,
        processes.client(through, readers, cpus),
    ):
        return asyncio.run(_refusals(through, idle, sizes))


async def _refusals(process: Process, idle: Process, sizes: Sizes) -> Figures:
    """idle: an engine that answers such calls beside, to tell what the machine does to times."""
    per_second = 100
    message = load.request(1)
    took: list[float] = []
    beside: list[float] = []
    codes: Counter[str] = Counter()
    async with load.channels(process.address) as (new,), load.channels(idle.address) as (direct,):

        async def refused() -> None:
            began = time.perf_counter()
            try:
                await new.unary_unary(load.UNARY)(message)
                codes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                codes[error.code().name] += 1
                took.append(time.perf_counter() - began)

        async def answered() -> None:
            beside.append(await load.unary_seconds(direct, message))

        async with asyncio.timeout(30):
            while "RESOURCE_EXHAUSTED" not in codes:  # until the readers have taken all places
                await refused()
                await asyncio.sleep(0.1)
        took.clear()
        codes.clear()

        calls: list[asyncio.Task[None]] = []
        used = process.cpu_seconds()
        began = time.perf_counter()
        for number in range(round(sizes.seconds * 2 * per_second)):
            await asyncio.sleep(began + number / (2 * per_second) - time.perf_counter())
            calls.append(asyncio.create_task(answered() if number % 2 else refused()))
        await asyncio.gather(*calls)
        cpu = (process.cpu_seconds() - used) / (time.perf_counter() - began)
    assert set(codes) == {"RESOURCE_EXHAUSTED"}, f"ended with {codes}"
    return {
        "refused": len(took),
        "per_second": per_second,
        "streams_beside": sizes.streams,
        "router_cpu": cpu,
        "p50_ms": load.percentile(took, 0.5) * MS,
        "p99_ms": load.percentile(took, 0.99) * MS,
        "max_ms": max(took) * MS,
        "without_router_p50_ms": load.percentile(beside, 0.5) * MS,
        "without_router_p99_ms": load.percentile(beside, 0.99) * MS,
    }


def killed(sizes: Sizes, cpus: Cpus) -> Figures:
    """Of two engines one is killed under load. Streams that had no token yet go elsewhere."""
    flags = ["--first-ms", "300", "--step-ms", "20"]
    with (
        processes.engines(2, flags, cpus) as (victim, other),
        processes.router([victim, other], [], cpus) as through,
    ):
        return asyncio.run(_killed(through, victim, sizes))


async def _killed(process: Process, victim: Process, sizes: Sizes) -> Figures:
    done: list[load.Streamed] = []
    stop = asyncio.Event()

    async def client(channel: Any) -> None:
        while not stop.is_set():
            done.append(await load.stream(channel, 20))

    async with load.channels(process.address, 2) as opened:
        clients = [asyncio.create_task(client(opened[n % 2])) for n in range(sizes.streams)]
        await asyncio.sleep(sizes.seconds / 2)
        before = len(done)
        victim.kill()
        await asyncio.sleep(sizes.seconds / 2)
        stop.set()
        await asyncio.gather(*clients)
    failed = [each for each in done if each.code is not grpc.StatusCode.OK]
    return {
        "streams": len(done),
        "before_the_kill": before,
        "failed_with_tokens": sum(each.messages > 0 for each in failed),
        "failed_without_token": sum(each.messages == 0 for each in failed),
    }


def independent(sizes: Sizes, cpus: Cpus, folder: Path) -> Figures:
    """k6 instead of our client: a unary call alone, with and without the router; and streams, as
    fast as they come."""
    figures: Figures = {}
    alone = k6.Work("unary", 1, sizes.calls, 1)
    many_streams = k6.Work("stream", sizes.streams, 1, sizes.tokens)
    with (
        processes.engines(1, [], cpus) as (engine,),
        processes.router([engine], [], cpus) as through,
    ):
        for way, process in (("direct", engine), ("router", through)):
            took = k6.run(process, alone, cpus, folder)["grpc_req_duration"]
            figures |= {f"{way}_p50_ms": took["med"], f"{way}_p99_ms": took["p(99)"]}
        began, busy = time.perf_counter(), through.cpu_seconds()
        streamed = k6.run(through, many_streams, cpus, folder)
        cpu, wall = through.cpu_seconds() - busy, time.perf_counter() - began
    tokens = streamed["tokens"]["count"]
    assert tokens == sizes.streams * sizes.tokens, f"{tokens} tokens"
    return figures | {
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / max(cpu, 0.01),
        "tokens_per_message": tokens / streamed["messages"]["count"],
    }


CASES: Mapping[str, Callable[..., Figures]] = {
    "latency": added_latency,
    "relay": relayed,
    "offered": offered,
    "many": many,
    "refusals": refusals,
    "killed": killed,
    "k6": independent,
}
NEED_FOLDER = frozenset({"refusals", "k6"})
