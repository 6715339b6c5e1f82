"""`neo serve`: router, gpu_service and cpu_service on this machine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from neo_client.local.child import ChildFailed, Say
from neo_client.local.plan import Wishes, make_plan, with_port
from neo_client.local.stack import LocalStack

GPU_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("served-model-name", str, "name that clients use; default: the last part of --model"),
    ("device", str, "cpu, cuda, cuda:N or auto (cuda where there is one)"),
    ("dtype", str, "float32, bfloat16, float16 or auto (the checkpoint's own)"),
    ("load-format", str, "auto reads the weights; dummy makes random ones"),
    ("max-context-tokens", int, "longest prompt plus output; default: the model's limit"),
    ("gpu-kv-gib", float, "size of the GPU tier's KV pool on --device cpu"),
    ("gpu-kv-blocks", int, "size of the GPU tier's KV pool in blocks of --block-tokens"),
    ("block-tokens", int, "tokens per KV block: 16, 32 or 64"),
    ("host-kv-gib", float, "size of the host tier's KV pool"),
    ("host-kv-dtype", str, "auto (the model's, exact) or int8 (half the bytes, stated error)"),
    ("offload", str, "never, auto (the scheduler decides) or always"),
    ("offload-transport", str, "shm or grpc"),
    ("max-batch-tokens", int, "tokens in one iteration, prompts' chunks included"),
    ("threads", int, "threads of the dense layers on --device cpu; default: all allowed cores"),
)  # fmt: skip


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="run router, gpu_service and cpu_service on this machine",
        description="Starts the three services as child processes on loopback, restarts a "
        "cpu_service that dies, and stops all on Ctrl-C or SIGTERM once live requests have ended.",
        epilog="Flags left out take the services' own defaults (python -m gpu_service --help). "
        "Exit codes: 0 stopped, 1 a service failed, 2 wrong usage.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH",
        help="Hugging Face directory or GGUF file; smollm2 is the packaged demonstration model",
    )  # fmt: skip
    parser.add_argument(
        "--listen", default="127.0.0.1:7000", metavar="HOST:PORT",
        help="the router's address; port 0 takes a free one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--http-listen", metavar="HOST:PORT",
        help="address of the router's HTTP listener with OpenAI's API; default: none",
    )  # fmt: skip
    add_stack_flags(parser)
    parser.set_defaults(run=run)


def add_stack_flags(parser: argparse.ArgumentParser) -> None:
    for name, kind, text in GPU_FLAGS:
        parser.add_argument(f"--{name}", type=kind, metavar="VALUE", help=text)
    parser.add_argument(
        "--set", action="append", default=[], metavar="SERVICE.NAME=VALUE", dest="overrides",
        help="any other setting of cpu, gpu or router, such as cpu.threads=4; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--drain-grace", type=float, default=10.0, metavar="SECONDS",
        help="how long live requests may go on when stopping (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning", "error"),
        help="of all three services (default: %(default)s)",
    )  # fmt: skip


def wishes(arguments: argparse.Namespace, directory: Path) -> Wishes:
    flags = [name.replace("-", "_") for name, _, _ in GPU_FLAGS]
    overrides = list(arguments.overrides)
    if http := getattr(arguments, "http_listen", None):  # not of all commands that use this
        # A free port is found here, so that it can be said. In front, for --set has the last word.
        overrides.insert(0, f"router.http_listen={with_port(http)}")
    return Wishes(
        listen=arguments.listen,
        directory=directory,
        grace_seconds=arguments.drain_grace,
        log_level=arguments.log_level,
        settings={
            # Before any change of folder, and before the service runs elsewhere.
            "model": absolute(arguments.model),
            **{name: getattr(arguments, name) for name in flags},
        },
        overrides=overrides,
    )


def absolute(model: str) -> str:
    """A path that exists, made absolute; anything else is a name for the gpu_service to know."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def print_line(service: str, line: str) -> None:
    print(f"{service:>11} | {line}", file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> int:
    async def announce(stack: LocalStack) -> None:
        plan = stack.plan
        services = [s for s in (plan.router, plan.gpu, plan.cpu) if s is not None]
        addresses = ", ".join(f"{service.module} {service.address}" for service in services)
        print_line("neo", f"serving: {addresses}")
        if http := plan.router.settings.get("http_listen"):
            print_line("neo", f"OpenAI's API: http://{http}/v1")
        if port := plan.router.settings.get("status_port"):
            print_line("neo", f"look: http://127.0.0.1:{port}/")
        print_line("neo", f'try: neo generate --address {plan.router.address} "Once upon a time"')
        await asyncio.Event().wait()  # until a signal, or the end of a service

    return asyncio.run(with_stack(arguments, print_line, announce))


async def with_stack(
    arguments: argparse.Namespace,
    say: Say,
    use: Callable[[LocalStack], Awaitable[None]],
    *,
    interrupted: int = 0,
) -> int:
    """Start the services, run `use` until it returns or a signal comes, stop them in order.

    Returns the exit code, `interrupted` after a signal. A second signal stops the services at once.
    """
    # Children are started by fork and exec beside gRPC's threads; none of it survives the exec.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    with tempfile.TemporaryDirectory(prefix="neo-") as directory:
        stack = LocalStack(make_plan(wishes(arguments, Path(directory))), say)
        work = asyncio.create_task(_work(stack, use))
        signals = 0

        def on_signal() -> None:
            nonlocal signals
            signals += 1
            if signals == 1:
                work.cancel()
            else:
                stack.kill()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        code = 0
        try:
            await work
        except asyncio.CancelledError:
            say("neo", "stopping; once more to stop at once")
            code = interrupted
        except ChildFailed as failure:
            say("neo", str(failure))
            code = 1
        finally:
            clean = await stack.stop()
        if not clean and code == 0:
            say("neo", "a service did not stop cleanly")
            code = 1
        return code


async def _work(stack: LocalStack, use: Callable[[LocalStack], Awaitable[None]]) -> None:
    """`use` beside the watch over the services; whichever ends first ends the other."""
    await stack.start()
    watching = asyncio.create_task(stack.watch())
    using = asyncio.ensure_future(use(stack))
    try:
        await asyncio.wait({watching, using}, return_when=asyncio.FIRST_COMPLETED)
        for task in (watching, using):
            if task.done():
                task.result()
    finally:
        for task in (watching, using):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ChildFailed):
                await task
