"""Settings of the three services for one machine, from what the user asked for."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neo_client.local.child import Service
from neo_client.local.stack import StackPlan

LOOPBACK = "127.0.0.1:0"
MODULES = ("cpu_service", "gpu_service", "router")
SHORT = {"cpu": "cpu_service", "gpu": "gpu_service", "router": "router"}


@dataclass(frozen=True)
class Wishes:
    """Flags of `neo serve`. `settings` are the gpu_service's by name; None leaves its default."""

    listen: str
    directory: Path
    grace_seconds: float
    log_level: str
    settings: dict[str, Any]
    overrides: Sequence[str] = ()
    """`SERVICE.NAME=VALUE`, the last word on anything."""


def with_port(address: str) -> str:
    """`address`, with a port that was free a moment ago where it says 0. A service that meets
    another there says so and ends. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"listen must be HOST:PORT, not {address!r}")
    if int(port) != 0:
        return address
    bare = host.removeprefix("[").removesuffix("]")
    try:
        family = socket.getaddrinfo(bare, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.bind((bare, 0))
            return f"{host}:{probe.getsockname()[1]}"
    except OSError as error:
        raise ValueError(
            f"listen: {host} is no address of this machine: {error.strerror}"
        ) from error


def parse_override(text: str) -> tuple[str, str, Any]:
    """(module, setting, value) of `SERVICE.NAME=VALUE`; the service itself knows its settings."""
    target, equals, value = text.partition("=")
    service, dot, name = target.partition(".")
    module = SHORT.get(service, service)
    if not equals or not dot or not name or module not in MODULES:
        raise ValueError(
            f"set must be cpu.NAME=VALUE, gpu.NAME=VALUE or router.NAME=VALUE, not {text!r}"
        )
    try:
        return module, name.replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"set: the value of {target} is not YAML: {value!r}") from error


def make_plan(wishes: Wishes) -> StackPlan:
    """Raises ValueError naming the flag."""
    common = {"log_level": wishes.log_level}
    settings: dict[str, dict[str, Any]] = {
        "cpu_service": {
            **common,
            "runtime_dir": str(wishes.directory),
            # Sessions close when the gpu_service ends, which is before the cpu_service is told to.
            "drain_grace_seconds": wishes.grace_seconds,
        },
        "gpu_service": {
            **common,
            "drain_grace_seconds": wishes.grace_seconds,
            **{name: value for name, value in wishes.settings.items() if value is not None},
        },
        "router": {**common, "drain_grace_seconds": wishes.grace_seconds},
    }
    for text in wishes.overrides:
        module, name, value = parse_override(text)
        settings[module][name] = value
    cpu: Service | None = None
    if settings["gpu_service"].get("offload") != "never":
        cpu = Service("cpu_service", with_port(LOOPBACK), settings["cpu_service"])
        settings["gpu_service"].setdefault("cpu_services", [cpu.address])
    gpu = Service("gpu_service", with_port(LOOPBACK), settings["gpu_service"])
    settings["router"].setdefault("backends", [gpu.address])
    settings["router"].setdefault("status_port", int(with_port(LOOPBACK).rpartition(":")[2]))
    router = Service("router", with_port(wishes.listen), settings["router"])
    return StackPlan(cpu, gpu, router, wishes.directory, wishes.grace_seconds)
