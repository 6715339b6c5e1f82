"""The cases, each a function from options to figures."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from benchmarks.router import load, processes
from benchmarks.router.processes import Cpus, Process

Figures = dict[str, Any]
MS = 1e3


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


FULL = Sizes(5, 400, 64, 400, 5000, 40.0, 8.0)
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
        processes.router([engine], ["--max-calls", str(2 * count)], cpus) as through,
    ):
        return asyncio.run(_many(through, count, tokens))


async def _many(process: Process, count: int, tokens: int) -> Figures:
    async with load.channels(process.address, 4) as opened:
        await load.streams(opened, 8, 2)
        idle = process.resident_mib()
        began = time.perf_counter()
        running = asyncio.gather(
            *(load.stream(opened[number % 4], tokens, f"s{number}") for number in range(count))
        )
        resident = [(0.0, idle)]
        while not (await asyncio.wait([running], timeout=0.2))[0]:
            resident.append((time.perf_counter() - began, process.resident_mib()))
        done = await running
    codes = Counter(each.code.name for each in done)
    assert codes == {"OK": count}, f"streams ended with {codes}"
    assert sum(each.tokens for each in done) == count * tokens
    opened_by = max(each.first_at or 0.0 for each in done) - began
    inside = [(at, mib) for at, mib in resident if at > opened_by] or resident
    fourth = max(1, len(inside) // 4)
    return {
        "streams": count,
        "all_open_after_seconds": opened_by,
        "idle_mib": idle,
        "peak_mib": max(mib for _, mib in resident),
        "kib_per_stream": (max(mib for _, mib in inside) - idle) * 1024 / count,
        "first_quarter_mib": statistics.mean(mib for _, mib in inside[:fourth]),
        "last_quarter_mib": statistics.mean(mib for _, mib in inside[-fourth:]),
    }


def refusals(sizes: Sizes, cpus: Cpus, folder: Path) -> Figures:
    """Calls beyond what the tenants file allows, while streams go on: how fast they are refused.
    Sent at a steady pace, whether or not those before were answered."""
    tenants = folder / "tenants.yaml"
    tenants.write_text(f"max_running: {sizes.streams}\nmax_queued: 0\n")
    with (
        processes.engines(1, ["--step-ms", "20", "--merge"], cpus) as (engine,),
        processes.router([engine], ["--tenants", str(tenants)], cpus) as through,
    ):
        return asyncio.run(_refusals(through, sizes))


async def _refusals(process: Process, sizes: Sizes) -> Figures:
    tokens = round((sizes.seconds + 2) * 50)
    per_second = 200
    message = load.request(1)
    async with load.channels(process.address) as (busy,), load.channels(process.address) as (new,):
        running = asyncio.gather(*(load.stream(busy, tokens) for _ in range(sizes.streams)))
        await asyncio.sleep(0.5)
        took: list[float] = []
        codes: Counter[str] = Counter()

        async def refused() -> None:
            began = time.perf_counter()
            try:
                await new.unary_unary(load.UNARY)(message)
                codes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                codes[error.code().name] += 1
                took.append(time.perf_counter() - began)

        calls, used = [], process.cpu_seconds()
        began = time.perf_counter()
        for number in range(round(sizes.seconds * per_second)):
            await asyncio.sleep(began + number / per_second - time.perf_counter())
            calls.append(asyncio.create_task(refused()))
        await asyncio.gather(*calls)
        cpu = (process.cpu_seconds() - used) / (time.perf_counter() - began)
        running.cancel()
    assert set(codes) == {"RESOURCE_EXHAUSTED"}, f"ended with {codes}"
    return {
        "refused": len(took),
        "per_second": per_second,
        "streams_beside": sizes.streams,
        "router_cpu": cpu,
        "p50_ms": load.percentile(took, 0.5) * MS,
        "p99_ms": load.percentile(took, 0.99) * MS,
        "max_ms": max(took) * MS,
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


CASES: Mapping[str, Callable[..., Figures]] = {
    "latency": added_latency,
    "relay": relayed,
    "offered": offered,
    "many": many,
    "refusals": refusals,
    "killed": killed,
}
