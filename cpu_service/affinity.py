"""How many attention threads a session gets, and where they run."""

from __future__ import annotations

import os

from cpu_service.config import CpuServiceConfig
from cpu_service.epoch import ThreadPlan

# With fewer, engine and attention threads share cores, and a pinned one could not get out of the
# other's way.
_MIN_CORES_TO_PIN = 4


def plan_threads(config: CpuServiceConfig) -> ThreadPlan:
    """Raises ValueError naming the field when the configuration does not fit this process's
    cpuset."""
    allowed = os.sched_getaffinity(0)
    foreign = sorted(set(config.cpus) - allowed)
    if foreign:
        raise ValueError(f"cpus: this process may not use CPU {foreign[0]}")
    if config.cpus:
        threads = config.threads or len(config.cpus)
        return ThreadPlan(threads, config.cpus[:threads], config.spin_us)
    threads = config.threads or max(len(allowed) - 2, 1)
    if config.threads == 0 and len(allowed) >= _MIN_CORES_TO_PIN:
        return ThreadPlan(threads, tuple(sorted(allowed))[-threads:], config.spin_us)
    return ThreadPlan(threads, (), config.spin_us)
