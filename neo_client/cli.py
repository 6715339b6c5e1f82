"""The `neo` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import grpc

from neo_client.commands import bench, chat, demo, doctor, drain, generate, keys, load, plan, serve
from neo_client.errors import explain

COMMANDS = (serve, generate, chat, load, bench, plan, drain, keys, doctor, demo)
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="neo",
        description="LLM serving that moves some requests' decode attention to the host CPU.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
        allow_abbrev=False,
    )
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except ValueError as error:
        print(f"neo {arguments.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except grpc.RpcError as error:
        print(f"neo {arguments.command}: {explain(error)}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # `neo load | head`
        sys.stderr.close()
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
