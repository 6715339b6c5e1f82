"""Everything that can be configured about a cpu_service. Loaded by `neo_common.config` (file <
NEO_* < flags)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

from neo_common.grpc.settings import ListenSettings


@dataclass(frozen=True)
class CpuServiceConfig(ListenSettings):
    """One cpu_service: host KV pools and decode attention over them, for the engines of this
    machine."""

    listen: str = "127.0.0.1:7101"
    """Address of the gRPC server; port 0 takes a free one."""
    runtime_dir: str = f"{tempfile.gettempdir()}/neo-serving"
    """Folder for the socket that hands memory over; gpu_service must see it under the same path, as
    the same user."""
    threads: int = 0
    """Attention threads of a session; 0 means the allowed cores less two, or all of them if fewer
    than four."""
    cpus: tuple[int, ...] = ()
    """CPUs to pin these threads to; empty means not pinned, or one each of the allowed CPUs when
    `threads` is 0."""
    numa_node: int = -1
    """The NUMA node that this process is bound to, for GetCapabilities; -1 means unknown."""
    isa: str = ""
    """Instruction set of the attention kernel (see `neo doctor`); empty takes the best that this
    CPU has."""
    max_pool_gib: float = 0.0
    """Host KV over all sessions; 0 means what the machine and its memory cgroups allow."""
    max_sessions: int = 4
    """Sessions at the same time."""
    max_rows: int = 4096
    """Largest sweep that a session may ask for."""
    max_lease_seconds: float = 600.0
    """Longest lease that a session may ask for."""
    spin_us: int = -1
    """How long an attention thread spins for work before it sleeps; more is faster and uses more
    CPU. -1 means 1000, or 20 where fewer than four cores are allowed."""
    drain_grace_seconds: float = 35.0
    """How long SIGTERM waits for sessions to close; a little longer than the gpu_service's own."""
    machine_report: str = ""
    """File that `neo doctor --write` made of this machine, to publish (GetMachine, metrics); empty:
    what this process sees, of which nothing is measured."""
    metrics_port: int = 0
    """Prometheus endpoint on this port; 0 means none."""
    log_level: str = "info"
    """`debug`, `info`, `warning` or `error`."""
    log_format: str = "text"
    """`text` or `json`."""

    def validate(self) -> None:
        """Raises ValueError naming the field."""
        self.validate_listener()
        for name in ("threads", "max_pool_gib", "drain_grace_seconds", "metrics_port"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.spin_us < -1:
            raise ValueError("spin_us must not be negative, except for -1")
        for name in ("max_sessions", "max_rows", "max_lease_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if any(cpu < 0 for cpu in self.cpus):
            raise ValueError("cpus must not hold negative numbers")
        if self.cpus and self.threads > len(self.cpus):
            raise ValueError("threads must not exceed the number of cpus given")
