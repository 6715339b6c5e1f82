"""The process: start, serve, drain."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path

import uvloop

from cpu_service.affinity import plan_threads
from cpu_service.config import CpuServiceConfig
from cpu_service.metrics import SessionCollector
from cpu_service.service import CpuAttentionServicer
from cpu_service.sessions import SessionTable
from neo_common.grpc.server import ServiceServer
from neo_common.machine.report import MachineCollector, MachineServicer, load
from neo_common.metrics import endpoint, service_registry
from neo_common.shm.handoff import HandoffServer
from protos.neo.v1 import cpu_attention_pb2 as pb
from protos.neo.v1 import cpu_attention_pb2_grpc as pb_grpc
from protos.neo.v1 import machine_pb2, machine_pb2_grpc

_log = logging.getLogger(__name__)


def _version() -> str:
    try:
        return importlib.metadata.version("neo-serving")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # straight from a source tree


async def serve(config: CpuServiceConfig) -> None:
    """Until SIGTERM or SIGINT and the drain after it. Raises ValueError when it cannot start."""
    machine = load(config.machine_report)
    plan = plan_threads(config)
    handoff = HandoffServer(Path(config.runtime_dir))
    handoff.start()
    try:
        table = SessionTable(config, handoff, plan)
        services = [
            pb.DESCRIPTOR.services_by_name["CpuAttentionService"],
            machine_pb2.DESCRIPTOR.services_by_name["MachineService"],
        ]
        # Attend streams last as long as their engine; `table.drain` is what waits for them.
        server = ServiceServer(
            config.listen, services, counted=lambda method: False, settings=config
        )
        servicer = CpuAttentionServicer(table, plan, _version(), config.numa_node)
        add = pb_grpc.add_CpuAttentionServiceServicer_to_server
        add(servicer, server.grpc)  # type: ignore[no-untyped-call]
        registry = service_registry("cpu_service")
        machine_pb2_grpc.add_MachineServiceServicer_to_server(MachineServicer(machine), server.grpc)
        registry.register(SessionCollector(table))
        registry.register(MachineCollector(machine))
        with endpoint(registry, config.metrics_port):
            address = await server.start()
            await server.set_serving(True)
            _log.info("listening on %s, %d attention threads a session", address, plan.threads)
            await server.wait_for_stop_signal()
            await server.set_serving(False)
            await table.drain(config.drain_grace_seconds)
            await server.drain(0.0)
    finally:
        handoff.close()


def run(config: CpuServiceConfig) -> None:
    uvloop.run(serve(config))
