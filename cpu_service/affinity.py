"""How many attention threads a session gets, and where they run."""

from __future__ import annotations

import os

from cpu_service.config import CpuServiceConfig
from cpu_service.epoch import ThreadPlan
from kernels import cpu

# With fewer, engine and attention threads share cores. A pinned thread could not get out of the
# other's way, and a spinning one takes the core that the dense layers need (docs/perf-log.md, "Data
# plane": a window of 1000 us cost half of the throughput on two cores, 20 us nothing).
_MIN_CORES_TO_PART = 4
_PARTED_SPIN_US = 1000
_SHARED_SPIN_US = 20


def plan_threads(config: CpuServiceConfig) -> ThreadPlan:
    """Raises ValueError naming the field when the configuration does not fit this process's
    cpuset."""
    try:
        cpu.isa()
    except ValueError as error:
        raise ValueError(f"isa: {error}") from error
    allowed = os.sched_getaffinity(0)
    foreign = sorted(set(config.cpus) - allowed)
    if foreign:
        raise ValueError(f"cpus: this process may not use CPU {foreign[0]}")
    parted = len(allowed) >= _MIN_CORES_TO_PART
    spin_us = config.spin_us
    if spin_us < 0:
        spin_us = _PARTED_SPIN_US if parted else _SHARED_SPIN_US
    if config.cpus:
        threads = config.threads or len(config.cpus)
        return ThreadPlan(threads, config.cpus[:threads], spin_us)
    if config.threads:
        return ThreadPlan(config.threads, (), spin_us)
    if parted:
        return ThreadPlan(cpu.default_threads(), cpu.default_cpus(), spin_us)
    return ThreadPlan(cpu.allowed_threads(), (), spin_us)
