"""`neo doctor`: what this machine offers and what is missing, by name; settings that fit it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from rich.console import Console
from rich.markup import escape

from neo_client.commands.flags import add_connection, connection_of
from neo_client.connect import Connection
from neo_client.doctor import install, measure, sizing
from neo_client.doctor.checks import CHECKS, GIB, Subject, examine
from neo_client.doctor.cuda import CudaError
from neo_client.doctor.finding import Cause, Finding, Level, refusal
from neo_common.machine import facts, report
from protos.neo.v1 import machine_pb2, machine_pb2_grpc

STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
DEFAULT_HOST_GIB = 2.0
DEFAULT_GPU_GIB = 1.0
AUTO = "auto"
ASK_SECONDS = 10.0
REPORT_FILE = "machine.json"


def add(subparsers: Any) -> None:
    causes = ", ".join(f"{cause.value} {cause.name}" for cause in Cause)
    parser = subparsers.add_parser(
        "doctor",
        help="say what this machine offers and what is missing",
        description="One line for each thing looked at: ok, warn or fail, with the remedy.",
        epilog=f"Exit codes: 0 nothing failed; else what failed first: {causes}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--for", dest="what", choices=sorted(CHECKS), default="all",
        help="what will run here; its memory limit is then its own (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--host-kv-gib", type=gib_or_auto, default=DEFAULT_HOST_GIB, metavar="GIB",
        help="host pool that you mean to use, or auto (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-kv-gib", type=float, default=DEFAULT_GPU_GIB, metavar="GIB",
        help="GPU pool on --device cpu; 0 on a machine with a GPU (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--step-gib", type=float, default=1.0, metavar="GIB",
        help="step memory of the model, which auto leaves (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--token-seconds", type=float, default=2.0, metavar="S",
        help="auto takes no pool that takes longer to read once (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--require", action="append", default=[], metavar="NAME",
        help="fail on a warning of this name, such as cores, numa or hugepages; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--measure", action="store_true", help="memory bandwidth, and the link of each GPU"
    )
    parser.add_argument(
        "--recommend", choices=("yaml", "flags"), help="print settings that fit, for each service"
    )
    parser.add_argument(
        "--write", type=Path, metavar="DIR",
        help=f"measure, then write {REPORT_FILE}, cpu_service.yaml and gpu_service.yaml there",
    )  # fmt: skip
    parser.add_argument(
        "--ask", action="store_true",
        help="print as JSON what a cpu_service or gpu_service at --address found, and nothing else",
    )  # fmt: skip
    add_connection(parser, "the service that --ask asks")
    parser.set_defaults(run=run)


def gib_or_auto(text: str) -> float | str:
    return text if text == AUTO else float(text)


def run(arguments: argparse.Namespace) -> int:
    """Raises ValueError for settings that make no sense."""
    if arguments.ask:
        print(ask(connection_of(arguments)))
        return 0
    known = {"bandwidth", "cores", "numa", "hugepages", "memlock", "memory", "cpu isa", "gpu"}
    known |= {"gpu link", "/dev/shm", "open files", "extension"}
    unknown = set(arguments.require) - known
    if unknown:
        raise ValueError(f"require: {min(unknown)} is not one of {', '.join(sorted(known))}")
    machine, problems = survey(arguments.measure or arguments.write is not None)
    wishes = sizing.Wishes(
        step_bytes=int(arguments.step_gib * GIB),
        token_seconds=arguments.token_seconds,
        alone=arguments.what in ("cpu_service", "pod"),
    )
    sized = sizing.size(machine, wishes)
    auto = arguments.host_kv_gib == AUTO
    pool_gib = sized.pool_gib if auto else arguments.host_kv_gib
    subject = Subject(machine, install.look(), pool_gib + arguments.gpu_kv_gib, auto)
    findings = examine(subject, arguments.what, tuple(arguments.require)) + problems
    if auto:
        findings.append(sized_finding(sized))
    console = Console(soft_wrap=True)
    for finding in findings:
        console.print(line(finding))
    refused = refusal(findings)
    if refused is not None:
        print(f"refused: {refused.cause.name}: {refused.name}: {refused.message}", file=sys.stderr)
        return int(refused.cause)
    publish(arguments, machine, sized)
    return 0


def survey(measured: bool) -> tuple[facts.Machine, list[Finding]]:
    """The machine, and what went wrong with its GPUs."""
    machine = facts.look()
    if measured:
        machine = measure.with_rates(machine)
    try:
        return measure.with_gpus(machine, links=measured), []
    except CudaError as error:
        remedy = "see what nvidia-smi says; the driver must be at least as new as the GPU wants"
        return machine, [Finding(Level.FAIL, "gpu", str(error), Cause.GPU, remedy)]


def sized_finding(sized: sizing.Sizing) -> Finding:
    text = f"{sized.pool_gib:g} GiB for the host pool, by {sized.limited_by}"
    if sized.pool_gib < sizing.MIN_POOL_GIB:
        remedy = "raise the memory limit, or lower --step-gib for a small model"
        return Finding(Level.FAIL, "pool", text, Cause.MEMORY, remedy)
    return Finding(Level.OK, "pool", text, Cause.MEMORY)


def publish(arguments: argparse.Namespace, machine: facts.Machine, sized: sizing.Sizing) -> None:
    """What was asked for of recommendations and files. Raises ValueError."""
    where = str(arguments.write / REPORT_FILE) if arguments.write else ""
    by_service = sizing.settings(sized, machine, where)
    for service, wanted in by_service.items():
        if arguments.recommend == "yaml":
            print(f"# {service}.yaml\n{sizing.as_yaml(wanted)}", end="")
        elif arguments.recommend == "flags":
            print(f"python -m {service} {sizing.as_flags(wanted)}")
    if not where:
        return
    try:
        report.save(machine, Path(where))
        for service, wanted in by_service.items():
            (arguments.write / f"{service}.yaml").write_text(sizing.as_yaml(wanted))
    except OSError as error:
        raise ValueError(f"write: {arguments.write} cannot be written: {error.strerror}") from error


def ask(connection: Connection) -> str:
    with connection.open() as channel:
        stub: Any = machine_pb2_grpc.MachineServiceStub(channel)
        request = machine_pb2.GetMachineRequest()
        answer = stub.GetMachine(request, timeout=ASK_SECONDS, metadata=connection.metadata())
    return str(json_format.MessageToJson(answer.machine, preserving_proto_field_name=True))


def line(finding: Finding) -> str:
    """With rich's markup."""
    text = f"[{STYLES[finding.level]}]{finding.level.value:>4}[/]  "
    text += f"{finding.name:<15} {escape(finding.message)}"
    if finding.remedy:
        text += f"\n      {'':<15} -> {escape(finding.remedy)}"
    return text
