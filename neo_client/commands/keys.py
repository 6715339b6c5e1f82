"""`neo keys`: make API keys."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import yaml

from neo_common.grpc.keys import new_key
from neo_common.grpc.principal import Role


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "keys", help="make API keys", description="Makes API keys.", allow_abbrev=False
    )
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", help="what to do with keys"
    )
    new = actions.add_parser(
        "new",
        help="print a new key, and its entry for the servers' file",
        description="Prints a new key to standard error, this once, and its entry for the file "
        "that the setting api_keys names to standard output. The entry holds a hash of the key.",
        epilog="For a file's first key: (echo keys:; neo keys new --name ci) > api_keys.yaml; for "
        "further ones: neo keys new --name web >> api_keys.yaml",
        allow_abbrev=False,
    )
    new.add_argument("--name", required=True, help="who will have it")
    new.add_argument("--tenant", help="whom its use counts for (default: the name)")
    new.add_argument(
        "--role", action="append", choices=[role.value for role in Role],
        help="what it may do; repeatable (default: inference)",
    )  # fmt: skip
    new.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    tenant = arguments.name if arguments.tenant is None else arguments.tenant
    key, entry = new_key(arguments.name, tenant, arguments.role or [Role.INFERENCE.value])
    print(yaml.safe_dump([entry], sort_keys=False), end="", flush=True)
    print(f"the key, which is not kept anywhere: {key}", file=sys.stderr)
    return 0
