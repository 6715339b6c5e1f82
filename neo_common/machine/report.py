"""A machine's facts as a file, as a message and as metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from neo_common.machine.facts import Machine, look
from protos.neo.v1 import machine_pb2 as pb
from protos.neo.v1 import machine_pb2_grpc as pb_grpc


def save(machine: Machine, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(machine)) + b"\n")


def load(path: str) -> Machine:
    """What was saved at `path`, or, for an empty one, a look of our own. Raises ValueError naming
    the setting."""
    if not path:
        return look()
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Machine)
    except OSError as error:
        raise ValueError(f"machine_report: cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ValueError(
            f"machine_report: {path} is no report of this release's neo doctor: {error}"
        ) from error


def message(machine: Machine) -> pb.MachineReport:
    return pb.MachineReport(
        architecture=machine.architecture,
        cpu_flags=machine.cpu_flags,
        cores=machine.cores,
        allowed_cpus=machine.cpus,
        cpu_quota=machine.quota,
        memory_bytes=machine.memory_bytes,
        available_bytes=machine.memory.bytes,
        available_limit=machine.memory.source,
        memory_limit_bytes=machine.memory_limit_bytes,
        memlock_bytes=machine.memlock_bytes,
        dev_shm_bytes=machine.shm_bytes,
        transparent_hugepages=machine.thp,
        shared_hugepages=machine.shmem_thp,
        hugepages=[
            pb.HugePages(
                page_bytes=pages.page_bytes,
                reserved=pages.reserved,
                free=pages.free,
                limit_bytes=pages.limit_bytes,
            )
            for pages in machine.hugepages
        ],
        numa_nodes=[
            pb.NumaNode(
                node=node.node,
                cpus=node.cpus,
                memory_bytes=node.memory_bytes,
                free_bytes=node.free_bytes,
            )
            for node in machine.numa
        ],
        allowed_nodes=machine.nodes,
        gpus=[
            pb.MachineGpu(
                name=gpu.name,
                memory_bytes=gpu.memory_bytes,
                pci_bus_id=gpu.pci_bus_id,
                numa_node=gpu.numa_node,
                to_device_bytes_per_second=gpu.to_device,
                to_host_bytes_per_second=gpu.to_host,
            )
            for gpu in machine.gpus
        ],
        memory_rates=[
            pb.MemoryRate(threads=rate.threads, bytes_per_second=rate.bytes_per_second)
            for rate in machine.rates
        ],
        open_files=machine.open_files,
    )


class MachineServicer(pb_grpc.MachineServiceServicer):
    def __init__(self, machine: Machine) -> None:
        self._response = pb.GetMachineResponse(machine=message(machine))

    async def GetMachine(
        self, request: pb.GetMachineRequest, context: Any
    ) -> pb.GetMachineResponse:
        return self._response


class MachineCollector(Collector):
    """`neo_machine_*`: what a panel sets a service's speed against. Nothing that is unlimited or
    was not measured is shown."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def collect(self) -> Iterator[Metric]:
        machine = self._machine
        yield InfoMetricFamily(
            "neo_machine", "The machine under this process.",
            value={
                "architecture": machine.architecture,
                "cpu_flags": " ".join(machine.cpu_flags),
                "numa_nodes": " ".join(map(str, machine.cpu_nodes)),
                "gpus": ", ".join(gpu.name for gpu in machine.gpus),
                "shared_hugepages": machine.shmem_thp,
            },
        )  # fmt: skip
        gauges = {
            "neo_machine_allowed_cpus": ("CPUs that it may run on.", len(machine.cpus)),
            "neo_machine_cpu_quota": ("CPU seconds a second that it may use.", machine.quota),
            "neo_machine_memory_limit_bytes": ("Its cgroups' limit.", machine.memory_limit_bytes),
            "neo_machine_memlock_bytes": ("Memory that it may lock.", machine.memlock_bytes),
        }
        for name, (text, value) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(name, text, value=value)
        yield from self._rates()

    def _rates(self) -> Iterator[Metric]:
        name = "neo_machine_memory_read_bytes_per_second"
        rates = GaugeMetricFamily(name, "Measured, by threads together.", labels=["threads"])
        for rate in self._machine.rates:
            rates.add_metric([str(rate.threads)], rate.bytes_per_second)
        yield rates
        name = "neo_machine_link_bytes_per_second"
        links = GaugeMetricFamily(name, "Measured, of a GPU.", labels=["gpu", "direction"])
        for gpu in self._machine.gpus:
            for direction, speed in (("to_device", gpu.to_device), ("to_host", gpu.to_host)):
                if speed:
                    links.add_metric([gpu.pci_bus_id, direction], speed)
        yield links
