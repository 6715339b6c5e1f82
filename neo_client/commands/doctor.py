"""`neo doctor`: what this machine offers and what is missing, by name."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.markup import escape

from neo_client.doctor.checks import examine
from neo_client.doctor.finding import Finding, Level
from neo_client.doctor.machine import look

STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
DEFAULT_HOST_GIB = 2.0
DEFAULT_GPU_GIB = 1.0


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what this machine offers and what is missing",
        description="One line for each thing looked at: ok, warn or fail, with the remedy.",
        epilog="Exit codes: 0 nothing failed, 1 something did.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--host-kv-gib", type=float, default=DEFAULT_HOST_GIB, metavar="GIB",
        help="host pool that you mean to use (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-kv-gib", type=float, default=DEFAULT_GPU_GIB, metavar="GIB",
        help="GPU pool on --device cpu; 0 on a machine with a GPU (default: %(default)g)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    findings = examine(look(), arguments.host_kv_gib + arguments.gpu_kv_gib)
    console = Console(soft_wrap=True)
    for finding in findings:
        console.print(line(finding))
    return int(any(finding.level is Level.FAIL for finding in findings))


def line(finding: Finding) -> str:
    """With rich's markup."""
    text = f"[{STYLES[finding.level]}]{finding.level.value:>4}[/]  "
    text += f"{finding.name:<15} {escape(finding.message)}"
    if finding.remedy:
        text += f"\n      {'':<15} -> {escape(finding.remedy)}"
    return text
