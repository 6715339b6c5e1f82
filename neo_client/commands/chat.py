"""`neo chat`: a conversation in the terminal, streamed."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

import grpc

from neo_client.client import Client
from neo_client.commands.flags import add_connection, connection_settings
from neo_client.errors import explain
from neo_client.options import Sampling
from neo_client.stats import StreamStats

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"
PROMPT = "> "

Message = dict[str, str]
Ask = Callable[[], str | None]


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to the model, line by line",
        description="Each line is a message; answers are streamed, and the whole conversation is "
        f"sent each time. {HELP}.",
        allow_abbrev=False,
    )
    add_connection(parser, "a router or a gpu_service")
    parser.add_argument("--model", default="", help="default: the server's default model")
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("--temperature", type=float, metavar="VALUE", help=">= 0; 0 is greedy")
    parser.add_argument("--top-p", type=float, metavar="VALUE", help="in (0, 1]")
    parser.add_argument("--seed", type=int, metavar="VALUE", help="makes the draws repeatable")
    parser.add_argument(
        "--max-tokens", type=int, metavar="VALUE", help="of one answer; default: what there is room"
    )
    parser.add_argument("--stats", action="store_true", help="a line of statistics per answer")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with Client(**connection_settings(arguments)) as client:
        model = client.model(arguments.model)
        if not model.has_chat_template:
            raise ValueError(f"model {model.name} has no chat template; try `neo generate --raw`")
        if sys.stdin.isatty():
            print(f"{model.name}. {HELP}.", file=sys.stderr)
        converse(client, arguments, ask_terminal if sys.stdin.isatty() else ask_pipe)
    return 0


def ask_terminal() -> str | None:
    with contextlib.suppress(ImportError):
        # The module gives input() a line to edit and a history.
        import readline  # noqa: F401
    try:
        return input(PROMPT)
    except EOFError:
        print()
        return None


def ask_pipe() -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def converse(client: Client, arguments: argparse.Namespace, ask: Ask) -> None:
    """Until /exit or the end of the input. A message whose answer failed is taken back, so that
    the next one finds a conversation that the server can take."""
    beginning: list[Message] = []
    if arguments.system:
        beginning = [{"role": "system", "content": arguments.system}]
    messages = list(beginning)
    while (line := ask()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(beginning)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            said = answer(client, arguments, messages)
            if said is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": said})


def answer(client: Client, arguments: argparse.Namespace, messages: list[Message]) -> str | None:
    """Print it as it comes; None when the call failed, what there is when Ctrl-C stopped it."""
    sampling = Sampling(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
    )
    parts: list[str] = []
    stats = StreamStats(time.perf_counter())
    try:
        with client.stream(messages, model=arguments.model, sampling=sampling) as stream:
            for message in stream:
                stats.take(message, time.perf_counter())
                for delta in message.deltas:
                    parts.append(delta.text)
                    print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except grpc.RpcError as error:
        print(flush=True)
        print(f"neo chat: {explain(error)}", file=sys.stderr)
        return None
    print(flush=True)
    if arguments.stats:
        print(stats.line(), file=sys.stderr)
    return "".join(parts)
