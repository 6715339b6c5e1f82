"""The case "http": OpenAI's API against gRPC at the same router, in turns."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable

from benchmarks.router import load, processes
from benchmarks.router.cases import MS, Figures, Sizes
from benchmarks.router.processes import Cpus, Process
from benchmarks.stack import free_port

PROMPT = list(range(1000, 1000 + load.PROMPT_TOKENS))


def over_http(sizes: Sizes, cpus: Cpus) -> Figures:
    """Tokens relayed per CPU second of the router as events and as gRPC messages, and what a call
    alone takes."""
    port = free_port()
    flags = ["--http-listen", f"127.0.0.1:{port}"]
    with (
        processes.engines(1, [], cpus) as (engine,),
        processes.router([engine], flags, cpus) as router,
    ):
        figures = asyncio.run(_latency(router, engine, port, sizes.calls * sizes.rounds))
        rates: dict[str, list[float]] = {"grpc": [], "http": []}
        ways = {"grpc": _by_grpc, "http": _by_http}
        for number in range(sizes.rounds + 1):
            for way, run in ways.items():
                tokens = sizes.streams * sizes.tokens
                busy = router.cpu_seconds()
                asyncio.run(run(router, port, sizes))
                spent = router.cpu_seconds() - busy
                if number:  # the first round warms up
                    rates[way].append(tokens / max(spent, 0.01))
    for way, found in rates.items():
        figures[f"{way}_tokens_per_cpu_second"] = statistics.median(found)
    figures["http_to_grpc"] = statistics.median(
        ours / theirs for ours, theirs in zip(rates["http"], rates["grpc"], strict=True)
    )
    return figures


async def _by_grpc(router: Process, port: int, sizes: Sizes) -> None:
    async with load.channels(router.address, 2) as opened:
        done = await load.streams(opened, sizes.streams, sizes.tokens)
    assert sum(each.tokens for each in done) == sizes.streams * sizes.tokens


async def _by_http(router: Process, port: int, sizes: Sizes) -> None:
    counts = await asyncio.gather(*(_events(port, sizes.tokens) for _ in range(sizes.streams)))
    assert all(count > 0 for count in counts)


def _post(tokens: int, *, stream: bool) -> bytes:
    body = json.dumps(
        {"model": "", "prompt": PROMPT, "max_tokens": tokens, "stream": stream}
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _events(port: int, tokens: int) -> int:
    """Events of one stream, read to its end; bytes are only looked through, as an SDK's parser
    would take more of the machine than the router."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_post(tokens, stream=True))
    events, tail = 0, b""
    while b"[DONE]" not in tail:
        data = await reader.read(1 << 16)
        if not data:
            raise SystemExit(f"the stream was cut: {tail[-200:]!r}")
        events += data.count(b"data: ")
        tail = tail[-16:] + data
    writer.close()
    return events


async def _latency(router: Process, engine: Process, port: int, calls: int) -> Figures:
    message = load.request(1)
    async with load.channels(router.address) as (through,), load.channels(engine.address) as (own,):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        post = _post(1, stream=False)

        async def http() -> float:
            began = time.perf_counter()
            writer.write(post)
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head.split(b"\r\n")[0], head
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            return time.perf_counter() - began

        ways: dict[str, Callable[[], Awaitable[float]]] = {
            "direct": lambda: load.unary_seconds(own, message),
            "grpc": lambda: load.unary_seconds(through, message),
            "http": http,
        }
        took: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(calls + 20):
            for way, call in ways.items():
                seconds = await call()
                if number >= 20:
                    took[way].append(seconds)
        writer.close()
    return {
        f"{way}_{name}_ms": load.percentile(values, part) * MS
        for way, values in took.items()
        for name, part in (("p50", 0.5), ("p99", 0.99))
    }
