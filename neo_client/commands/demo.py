"""`neo demo`: a real prompt through all three services, decoded on the host tier."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys
import time
from typing import Any

from neo_client.aio import AsyncClient
from neo_client.commands import serve
from neo_client.local.stack import LocalStack
from neo_client.options import Sampling, Scheduling
from neo_client.stats import StreamStats

PROMPT = "In two or three sentences: why does it rain more on mountains than on plains?"
ANSWER_SECONDS = 300.0
EXIT_INTERRUPTED = 130
LOG_LINE = re.compile(r"^\S+ \S+ (?P<level>\w+) +\S+ \S+: (?P<message>.*)$")
"""What `neo_common.logging` writes as text."""


class DemoFailed(Exception):
    """The demonstration did not show what it is there to show."""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="one real prompt through all three services",
        description="Starts the services as `neo serve` does, sends one chat prompt through the "
        "router with its decode attention in the cpu_service over shared memory, streams the "
        "text, prints statistics, stops all. Fails when no token was decoded on the host tier.",
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="default: %(default)s")
    parser.add_argument(
        "--model",
        default="smollm2",
        metavar="PATH",
        help="as for `neo serve` (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=160, help="of the answer (default: %(default)s)"
    )
    serve.add_stack_flags(parser)
    parser.set_defaults(
        run=run, listen="127.0.0.1:0", offload="always", offload_transport="shm",
        host_kv_gib=0.5, gpu_kv_gib=0.25,
    )  # fmt: skip


def say(service: str, line: str) -> None:
    """Progress as the services report it, without the trimmings of a log line."""
    found = LOG_LINE.match(line)
    message = found["message"] if found else line
    if found and found["level"] == "DEBUG":
        return
    print(f"  {service:>11}  {message}", file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    print("starting router, gpu_service and cpu_service", file=sys.stderr, flush=True)

    async def answer(stack: LocalStack) -> None:
        print(f"ready after {time.perf_counter() - started:.1f} s\n", file=sys.stderr)
        await show_answer(stack.plan.router.address, arguments)

    try:
        return asyncio.run(serve.with_stack(arguments, say, answer, interrupted=EXIT_INTERRUPTED))
    except DemoFailed as failure:
        print(f"neo demo: {failure}", file=sys.stderr)
        return 1


async def show_answer(address: str, arguments: argparse.Namespace) -> None:
    """Stream one answer and its statistics. Raises DemoFailed unless the host tier decoded it."""
    print(f"> {arguments.prompt}\n", flush=True)
    stats = StreamStats(time.perf_counter())
    async with AsyncClient(address) as client:
        stream = client.stream(
            [{"role": "user", "content": arguments.prompt}],
            sampling=Sampling(temperature=0.0, max_tokens=arguments.max_tokens),
            scheduling=Scheduling(placement="cpu-preferred"),
            deadline_seconds=ANSWER_SECONDS,
        )
        async with contextlib.aclosing(stream) as messages:
            async for message in messages:
                stats.take(message, time.perf_counter())
                print("".join(delta.text for delta in message.deltas), end="", flush=True)
    print(f"\n\n{stats.line()}\n", flush=True)
    if stats.usage is None or stats.tokens == 0:
        raise DemoFailed("the answer was empty")
    if stats.usage.host_tokens == 0:
        raise DemoFailed("no token was decoded on the host tier")
