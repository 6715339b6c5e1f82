"""Flags that commands share: which server, and how to show who is calling."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neo_client.connect import Connection, Tls

DEFAULT_ADDRESS = "127.0.0.1:7000"
TOKEN_VARIABLE = "NEO_TOKEN"


def add_connection(parser: argparse.ArgumentParser, what: str) -> None:
    """what: whose address it is."""
    parser.add_argument(
        "--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT",
        help=f"of {what}; several, comma-separated, share the calls (default: %(default)s)",
    )  # fmt: skip
    group = parser.add_argument_group("security")
    group.add_argument(
        "--tls", action="store_true", help="TLS, with the system's certificate authorities"
    )
    group.add_argument("--tls-ca", default="", metavar="FILE", help="TLS, with these authorities")
    group.add_argument(
        "--tls-cert", default="", metavar="FILE", help="certificate to show (mutual TLS)"
    )
    group.add_argument("--tls-key", default="", metavar="FILE", help="its private key")
    group.add_argument(
        "--tls-name", default="", metavar="NAME",
        help="name in the server's certificate, where that is not the address",
    )  # fmt: skip
    group.add_argument(
        "--token-file", metavar="FILE",
        help=f"API key or JWT to present; default: the variable {TOKEN_VARIABLE}",
    )  # fmt: skip


def connection_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of Connection, Client and AsyncClient. Raises ValueError."""
    files = (arguments.tls_ca, arguments.tls_cert, arguments.tls_key, arguments.tls_name)
    tls = Tls(*files) if arguments.tls or any(files) else None
    token = os.environ.get(TOKEN_VARIABLE, "")
    if arguments.token_file:
        try:
            token = Path(arguments.token_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"token-file: cannot read {arguments.token_file}: {error}") from None
    return {"address": arguments.address, "tls": tls, "token": token or None}


def connection_of(arguments: argparse.Namespace) -> Connection:
    """Raises ValueError."""
    return Connection(**connection_settings(arguments))


def target_of(names: Sequence[str]) -> Callable[[str], tuple[str, float]]:
    """A type for flags like `ttft=500`: one of `names`, and milliseconds."""

    def target(text: str) -> tuple[str, float]:
        name, _, value = text.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        if name not in names or limit <= 0:
            raise argparse.ArgumentTypeError(
                f"must be NAME=MS with a name of {', '.join(names)}, not {text!r}"
            )
        return name, limit

    return target
