"""How many attention threads a session gets, and where they run."""

from __future__ import annotations

import os

from cpu_service.config import CpuServiceConfig
from cpu_service.epoch import ThreadPlan
from kernels import cpu

# With fewer, engine and attention threads share cores, and a pinned one could not get out of the
# other's way.
_MIN_CORES_TO_PIN = 4


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
    if config.cpus:
        threads = config.threads or len(config.cpus)
        return ThreadPlan(threads, config.cpus[:threads], config.spin_us)
    threads = config.threads or cpu.default_threads()
    if config.threads == 0 and len(allowed) >= _MIN_CORES_TO_PIN:
        return ThreadPlan(threads, cpu.default_cpus(), config.spin_us)
    return ThreadPlan(threads, (), config.spin_us)
