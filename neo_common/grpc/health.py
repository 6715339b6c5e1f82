"""What grpc.health.v1 says of a service, under which names, and where.

"" and "readiness"     calls are welcome: the model is loaded, a backend is up, no drain has begun
"liveness"             the process works; starting it again would not help it
a service's full name  as ""
"host-tier"            of a gpu_service: its cpu_service is there; it serves without, but less

`health_listen` offers the same answers on a port of their own, in clear and with nothing else: a
kubelet's gRPC probe can neither speak TLS nor reach a listener on loopback.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

READINESS = "readiness"
LIVENESS = "liveness"
HOST_TIER = "host-tier"


class Health:
    """One process's answers, for any number of listeners. Use from one event loop."""

    def __init__(self, services: Iterable[str]) -> None:
        """services: full names, which say what "" says."""
        self._ready_names = ("", READINESS, *services)
        self._servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]

    def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set_ready(self, ready: bool) -> None:
        for name in self._ready_names:
            await self.set(name, ready)

    async def set(self, name: str, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.NOT_SERVING
        if serving:
            status = health_pb2.HealthCheckResponse.SERVING
        await self._servicer.set(name, status)
