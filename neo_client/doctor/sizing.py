"""Settings that fit a machine: a pure function of its facts.

    limit |== the cpu_service itself ==|== step memory ==|======== host KV pool ========|
          (of its container, or 0.8 of what is free where others allocate, too)

A full pool is read once for each token that its requests get, so memory bandwidth bounds how large
a pool is of use: `pool <= bandwidth * token_seconds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from neo_common.machine.facts import Machine

GIB = 1 << 30
PROCESS_BYTES = GIB // 2
"""Of a cpu_service without its pools."""
SHARED_PART = 0.8
"""Of free memory that one pool may take where others allocate, too."""
MIN_POOL_GIB = 0.25
SPARED_CPUS = 2
"""That a cpu_service leaves by itself where it may use at least `MIN_CPUS`, or it takes all."""
MIN_CPUS = 4
_ENOUGH = 0.97
"""Of the best rate: threads beyond that only take cores from others."""


@dataclass(frozen=True)
class Wishes:
    """What the operator asks of the host tier."""

    step_bytes: int = GIB
    """Step memory that the model needs (docs/operations.md has the formula)."""
    token_seconds: float = 2.0
    """Longest time between two tokens of a request when the pool is full."""
    alone: bool = False
    """The memory limit around this process is the cpu_service's own, as in a pod."""


@dataclass(frozen=True)
class Sizing:
    pool_gib: float
    """Whole quarters; 0 where there is no room."""
    threads: int
    """Attention threads; 0: what a cpu_service takes by itself."""
    limited_by: str
    """What sets the pool's size, in words."""


def size(machine: Machine, wishes: Wishes) -> Sizing:
    part = 1.0 if wishes.alone else SHARED_PART
    room = int(part * machine.memory.bytes) - PROCESS_BYTES - wishes.step_bytes
    limited_by = machine.memory.source
    fastest = max((rate.bytes_per_second for rate in machine.rates), default=0.0)
    if fastest and fastest * wishes.token_seconds < room:
        room = int(fastest * wishes.token_seconds)
        limited_by = (
            f"{fastest / 1e9:.0f} GB/s, at which more takes longer than "
            f"{wishes.token_seconds:g} s a token"
        )
    quarters = max(room, 0) * 4 // GIB
    return Sizing(quarters / 4, _threads(machine), limited_by)


def _threads(machine: Machine) -> int:
    """The fewest that read about as fast as any number does; 0 where the service's own rule gives
    as much."""
    fastest = max((rate.bytes_per_second for rate in machine.rates), default=0.0)
    enough = [r for r in machine.rates if r.bytes_per_second >= _ENOUGH * fastest]
    cpus = machine.whole_cpus
    own = cpus - SPARED_CPUS if cpus >= MIN_CPUS else cpus
    by_rule = [rate for rate in enough if rate.threads == own]
    if not enough or by_rule:
        return 0
    return min(rate.threads for rate in enough)


def settings(sizing: Sizing, machine: Machine, report: str) -> dict[str, dict[str, Any]]:
    """By service, for its `--config`. report: path of the machine's report, "" for none."""
    nodes = machine.cpu_nodes
    cpu: dict[str, Any] = {
        "threads": sizing.threads,
        "numa_node": nodes[0] if len(nodes) == 1 else -1,
    }
    gpu: dict[str, Any] = {"host_kv_gib": sizing.pool_gib}
    if report:
        cpu["machine_report"] = gpu["machine_report"] = report
    return {"cpu_service": cpu, "gpu_service": gpu}


def as_yaml(wanted: dict[str, Any]) -> str:
    """For one service's `--config`."""
    return yaml.safe_dump(wanted, sort_keys=False)


def as_flags(wanted: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')}={value}" for name, value in wanted.items())
