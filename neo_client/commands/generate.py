"""`neo generate`: one prompt, streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from neo_client.client import Client
from neo_client.commands.flags import add_connection, connection_settings
from neo_client.options import PLACEMENTS, Prompt, Sampling, Scheduling, Structured
from neo_client.stats import StreamStats

SAMPLING_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("temperature", float, ">= 0; 0 is greedy (server's default: 1)"),
    ("top-p", float, "in (0, 1]"),
    ("top-k", int, ">= 0; 0 is off"),
    ("min-p", float, "in [0, 1]; 0 is off"),
    ("repetition-penalty", float, "> 0; 1 is off"),
    ("presence-penalty", float, "in [-2, 2]"),
    ("frequency-penalty", float, "in [-2, 2]"),
    ("seed", int, "makes the draws repeatable"),
    ("max-tokens", int, "default: up to the model's context length"),
    ("min-tokens", int, "no end before that many"),
    ("n", int, "number of choices, 1 to 16"),
    ("logprobs", int, "log probability of each token and of that many likely ones, 0 to 20"),
    ("prompt-logprobs", int, "the same for the prompt"),
)


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="send one prompt and stream the answer",
        description="Streams the answer to stdout, then a line of statistics to stderr.",
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", help="the prompt; - or nothing reads standard input")
    add_connection(parser, "a router or a gpu_service")
    parser.add_argument("--model", default="", help="default: the server's default model")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without the chat template"
    )
    kind.add_argument("--system", metavar="TEXT", help="system message of the chat")
    kind.add_argument("--token-ids", action="store_true", help="the prompt is numbers: token ids")
    sampling = parser.add_argument_group("sampling (see neo.v1.SamplingParams)")
    for name, type_, text in SAMPLING_FLAGS:
        sampling.add_argument(f"--{name}", type=type_, metavar="VALUE", help=text)
    sampling.add_argument("--stop", action="append", default=[], help="end before it; repeatable")
    sampling.add_argument(
        "--stop-token-id", action="append", default=[], type=int, metavar="ID",
        help="end after it; repeatable",
    )  # fmt: skip
    sampling.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=BIAS", type=bias,
        help="add BIAS in [-100, 100] to a token's logit; repeatable",
    )  # fmt: skip
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past the model's end")
    add_structured(parser)
    placing = parser.add_argument_group("scheduling (see neo.v1.SchedulingParams)")
    placing.add_argument("--placement", choices=tuple(PLACEMENTS), help="where it may decode")
    placing.add_argument("--priority", type=int, default=0, help="-100 to 100 (default: 0)")
    placing.add_argument("--ttft-ms", type=float, help="target for the first token")
    placing.add_argument("--tpot-ms", type=float, help="target for each further token")
    placing.add_argument(
        "--cache-salt", default="", metavar="TEXT",
        help="share KV of equal beginnings with requests that say the same here only",
    )  # fmt: skip
    parser.add_argument("--request-id", default="", help="default: the server makes one")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="give up after that long")
    parser.add_argument(
        "--include-special-tokens", action="store_true", help="keep special tokens in the text"
    )
    parser.add_argument(
        "--show", choices=("text", "tokens", "messages"), default="text",
        help="text, token ids, or whole messages (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-stats", action="store_true", help="no line of statistics")
    parser.set_defaults(run=run)


def add_structured(parser: argparse.ArgumentParser) -> None:
    form = parser.add_argument_group("form of the answer (see neo.v1.StructuredOutput)")
    only = form.add_mutually_exclusive_group()
    only.add_argument("--json-schema", metavar="JSON|@FILE", type=text_or_file, help="JSON of it")
    only.add_argument("--json", action="store_true", help="any JSON object")
    only.add_argument("--regex", metavar="REGEX", help="matched by it as a whole")
    only.add_argument("--grammar", metavar="TEXT|@FILE", type=text_or_file, help="Lark or GBNF")
    only.add_argument(
        "--choice", action="append", default=[], metavar="TEXT", help="one of these; repeatable"
    )


def text_or_file(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {text[1:]}: {error}") from None


def structured_of(arguments: argparse.Namespace) -> Structured | None:
    said = Structured(
        json_schema=arguments.json_schema,
        regex=arguments.regex,
        grammar=arguments.grammar,
        json_object=arguments.json,
        choices=tuple(arguments.choice),
    )
    return None if said == Structured() else said


def bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ID=BIAS, not {text!r}") from None


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    plain = {name.replace("-", "_") for name, _, _ in SAMPLING_FLAGS}
    return Sampling(
        **{name: getattr(arguments, name) for name in plain},
        stop=tuple(arguments.stop),
        stop_token_ids=tuple(arguments.stop_token_id),
        logit_bias=dict(arguments.logit_bias),
        ignore_eos=arguments.ignore_eos,
        structured=structured_of(arguments),
    )


def prompt_of(arguments: argparse.Namespace, client: Client) -> Prompt:
    """A chat where the model has a template for one, else the text as it is. Raises ValueError when
    token ids are asked for and other words given."""
    text = arguments.prompt
    if text is None or text == "-":
        text = sys.stdin.read()
    if arguments.token_ids:
        try:
            return [int(word) for word in text.replace(",", " ").split()]
        except ValueError:
            raise ValueError("prompt must be token ids, numbers separated by spaces") from None
    if arguments.raw or not (arguments.system or client.model(arguments.model).has_chat_template):
        return str(text)
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return [*messages, {"role": "user", "content": text}]


def run(arguments: argparse.Namespace) -> int:
    several = (arguments.n or 1) > 1
    with Client(**connection_settings(arguments)) as client:
        prompt = prompt_of(arguments, client)
        stats = StreamStats(time.perf_counter())
        with client.stream(
            prompt,
            model=arguments.model,
            request_id=arguments.request_id,
            sampling=sampling_of(arguments),
            scheduling=Scheduling(
                arguments.placement,
                arguments.priority,
                arguments.ttft_ms,
                arguments.tpot_ms,
                arguments.cache_salt,
            ),
            deadline_seconds=arguments.deadline,
            include_special_tokens=arguments.include_special_tokens,
            token_ids_only=arguments.show == "tokens",
        ) as messages:
            for message in messages:
                stats.take(message, time.perf_counter())
                show(message, arguments.show, several)
    if arguments.show != "messages":
        print()
    if not arguments.no_stats:
        print(stats.line(), file=sys.stderr)
    return 0


def show(message: Any, what: str, several: bool) -> None:
    """Print what is new; with several choices each line names its choice."""
    if what == "messages":
        print(message, flush=True)
        return
    for delta in message.deltas:
        text = delta.text if what == "text" else "".join(f"{t} " for t in delta.token_ids)
        if several and text:
            print(f"[{delta.index}] {text!r}" if what == "text" else f"[{delta.index}] {text}")
        else:
            sys.stdout.write(text)
            sys.stdout.flush()
