"""What a process may use of its machine. Nothing here judges; nothing here is slow."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass

from neo_common.machine import kernel
from neo_common.machine.kernel import Roots
from neo_common.shm.limits import MemoryHeadroom, memory_headroom

_HUGEPAGES = re.compile(r"hugepages-(\d+)kB")


@dataclass(frozen=True)
class NumaNode:
    node: int
    cpus: tuple[int, ...]
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class HugePages:
    """Pages of one size that were reserved."""

    page_bytes: int
    reserved: int
    free: int
    limit_bytes: int | None
    """What the cgroups of this process allow; None: no limit."""

    @property
    def usable_bytes(self) -> int:
        free = self.free * self.page_bytes
        return free if self.limit_bytes is None else min(free, self.limit_bytes)


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    pci_bus_id: str
    numa_node: int | None
    """None where the kernel does not say."""
    to_device: float = 0.0
    """Bytes per second from pinned host memory; 0: not measured."""
    to_host: float = 0.0


@dataclass(frozen=True)
class MemoryRate:
    """Measured: that many threads together read main memory."""

    threads: int
    bytes_per_second: float


@dataclass(frozen=True)
class Machine:
    """Facts of one process's surroundings, and what was measured there."""

    architecture: str
    cpu_flags: tuple[str, ...]
    cores: int
    """Of the machine."""
    cpus: tuple[int, ...]
    """That this process may run on."""
    quota: float | None
    """CPU time per second that its cgroups grant; None: no limit."""
    memory_bytes: int
    """Of the machine."""
    memory: MemoryHeadroom
    memory_limit_bytes: int | None
    """Tightest limit of its memory cgroups; None: none."""
    memlock_bytes: int | None
    """None: unlimited."""
    open_files: int
    shm_bytes: int
    """Size of /dev/shm; 0: there is none."""
    thp: str
    """Transparent huge pages: "always", "madvise", "never", or "" where unknown."""
    shmem_thp: str
    """The same for shared memory, where the host KV pool lives."""
    hugepages: tuple[HugePages, ...]
    numa: tuple[NumaNode, ...]
    nodes: tuple[int, ...]
    """NUMA nodes that this process may allocate from."""
    gpus: tuple[Gpu, ...] = ()
    """Empty also where nobody has asked the driver."""
    rates: tuple[MemoryRate, ...] = ()
    """Empty: not measured."""

    @property
    def cpu_nodes(self) -> tuple[int, ...]:
        """NUMA nodes of the CPUs that this process may run on."""
        mine = set(self.cpus)
        return tuple(node.node for node in self.numa if mine & set(node.cpus))

    @property
    def whole_cpus(self) -> int:
        """CPUs that it can keep busy all the time."""
        allowed = len(self.cpus)
        return allowed if self.quota is None else max(1, min(allowed, int(self.quota)))


def look(roots: Roots | None = None) -> Machine:
    """What this process sees; GPUs and rates are for others to add."""
    roots = roots or Roots()
    total = kernel.meminfo(kernel.read(roots.proc / "meminfo")).get("MemTotal", 0) * 1024
    thp = roots.sys / "kernel/mm/transparent_hugepage"
    cpus = kernel.allowed(roots, "Cpus") or tuple(sorted(os.sched_getaffinity(0)))
    return Machine(
        architecture=platform.machine(),
        cpu_flags=kernel.cpu_flags(roots),
        cores=os.cpu_count() or 1,
        cpus=cpus,
        quota=kernel.cpu_quota(roots),
        memory_bytes=total,
        memory=memory_headroom(roots.proc, roots.cgroups),
        memory_limit_bytes=kernel.group_limit(
            roots, "memory", "memory.max", "memory.limit_in_bytes", total
        ),
        memlock_bytes=kernel.resource_limit(roots, "Max locked memory"),
        open_files=kernel.resource_limit(roots, "Max open files") or 1 << 20,
        shm_bytes=_shm_bytes(roots),
        thp=kernel.chosen(thp / "enabled"),
        shmem_thp=kernel.chosen(thp / "shmem_enabled"),
        hugepages=_hugepages(roots),
        numa=_numa(roots),
        nodes=kernel.allowed(roots, "Mems"),
    )


def gpu_node(pci_bus_id: str, roots: Roots | None = None) -> int | None:
    """The NUMA node next to a PCI device, such as 0000:0f:00.0."""
    devices = (roots or Roots()).sys / "bus/pci/devices"
    node = kernel.number(devices / pci_bus_id.lower() / "numa_node")
    return node if node is not None and node >= 0 else None  # -1: the firmware did not say


def _shm_bytes(roots: Roots) -> int:
    try:
        usage = os.statvfs(roots.shm)
    except OSError:
        return 0
    return usage.f_blocks * usage.f_frsize


def _hugepages(roots: Roots) -> tuple[HugePages, ...]:
    found = []
    for folder in (roots.sys / "kernel/mm/hugepages").glob("hugepages-*kB"):
        match = _HUGEPAGES.fullmatch(folder.name)
        if match is None:
            continue
        size = int(match[1]) * 1024
        name = f"{size >> 30}GB" if size >= 1 << 30 else f"{size >> 20}MB"
        v2, v1 = f"hugetlb.{name}.max", f"hugetlb.{name}.limit_in_bytes"
        limit = kernel.group_limit(roots, "hugetlb", v2, v1, 1 << 60)
        reserved = kernel.number(folder / "nr_hugepages") or 0
        free = kernel.number(folder / "free_hugepages") or 0
        found.append(HugePages(size, reserved, free, limit))
    return tuple(sorted(found, key=lambda pages: pages.page_bytes))


def _numa(roots: Roots) -> tuple[NumaNode, ...]:
    found = []
    for folder in (roots.sys / "devices/system/node").glob("node[0-9]*"):
        memory = kernel.meminfo(kernel.read(folder / "meminfo"))
        found.append(
            NumaNode(
                node=int(folder.name.removeprefix("node")),
                cpus=kernel.numbers_of(kernel.read(folder / "cpulist")),
                memory_bytes=memory.get("MemTotal", 0) * 1024,
                free_bytes=memory.get("MemFree", 0) * 1024,
            )
        )
    return tuple(sorted(found, key=lambda node: node.node))
