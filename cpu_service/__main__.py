"""`python -m cpu_service --config FILE`."""
from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import grpc
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cpu_service.affinity import plan_threads
from cpu_service.config import CpuServiceConfig
from cpu_service.service import CpuAttentionServicer
from cpu_service.sessions import SessionTable
from neo_common.shm.handoff import HandoffServer
from protos.neo.v1 import cpu_attention_pb2_grpc as pb_grpc


async def serve(config: CpuServiceConfig) -> None:
    plan = plan_threads(config)
    handoff = HandoffServer(Path(config.runtime_dir))
    handoff.start()
    table = SessionTable(config, handoff, plan)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)])
    pb_grpc.add_CpuAttentionServiceServicer_to_server(CpuAttentionServicer(table, plan, "x", config.numa_node), server)
    h = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(h, server)
    server.add_insecure_port(config.listen)
    await h.set("", health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    stop = asyncio.Event()
    for s in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(s, stop.set)
    await stop.wait()
    await h.enter_graceful_shutdown()
    await table.drain(config.drain_grace_seconds)
    await server.stop(1)
    handoff.close()


config = CpuServiceConfig(**yaml.safe_load(Path(sys.argv[2]).read_text()))
import logging
logging.basicConfig(level="INFO")
asyncio.run(serve(config))
