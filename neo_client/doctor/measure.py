"""Measures what a machine says nothing about: how fast its memory is read, and its GPUs' links."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from neo_client.doctor import cuda
from neo_common.machine.facts import Gpu, Machine, MemoryRate, gpu_node

MAX_BYTES = 1 << 30
"""Beyond any cache, where the memory's limit allows it."""
SECONDS = 0.2
"""Reading goes on for that long with each number of threads; the best pass counts."""

Reader = Callable[[int, tuple[int, ...]], float]
"""`read(threads, cpus)`: bytes per second."""


def thread_counts(cpus: int) -> tuple[int, ...]:
    """Which numbers of threads to try: powers of two, and all CPUs, less one, less two."""
    powers = {1 << bit for bit in range(cpus.bit_length())}
    return tuple(sorted(n for n in powers | {cpus, cpus - 1, cpus - 2} if 1 <= n <= cpus))


def with_rates(machine: Machine, reader: Reader | None = None) -> Machine:
    """With the read rate of its memory; as it is where the extension is missing."""
    if reader is None:
        size = min(MAX_BYTES, machine.memory.bytes // 4) // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            reader = _reader(size, machine.cpus[-machine.whole_cpus :])
        except ImportError:
            return machine
    most = machine.whole_cpus
    # The highest numbers, as the cpu_service pins its threads.
    rates = [MemoryRate(n, reader(n, machine.cpus[-n:])) for n in thread_counts(most)]
    return replace(machine, rates=tuple(rates))


def with_gpus(machine: Machine, *, links: bool, library: Any = None) -> Machine:
    """With its GPUs, their places and, if asked for, their links' speed. Raises CudaError."""
    found = []
    for ordinal, gpu in enumerate(cuda.gpus(library)):
        to_device, to_host = cuda.link_rates(ordinal, library) if links else (0.0, 0.0)
        found.append(
            Gpu(
                gpu.name, gpu.memory_bytes, gpu.pci_bus_id, gpu_node(gpu.pci_bus_id),
                to_device, to_host,
            )
        )  # fmt: skip
    return replace(machine, gpus=tuple(found))


def _reader(size: int, all_cpus: tuple[int, ...]) -> Reader:
    """Raises ImportError without the extension."""
    from kernels import cpu

    memory = mmap.mmap(-1, size)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with cpu.ThreadPool(len(all_cpus), all_cpus) as pool:  # pages on the nodes of all of them
        cpu.first_touch(place, size, pool)

    def read(threads: int, cpus: tuple[int, ...]) -> float:
        with cpu.ThreadPool(threads, cpus) as pool:
            best, started = 0.0, time.perf_counter()
            while (now := time.perf_counter()) < started + SECONDS or not best:
                cpu.read_all(place, len(memory), pool)  # `memory` keeps what is at `place`
                best = max(best, len(memory) / (time.perf_counter() - now))
            return best

    return read
