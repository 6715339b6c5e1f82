"""`neo drain`: let a gpu_service finish what it has and take nothing new."""

from __future__ import annotations

import argparse
from typing import Any

import grpc

from neo_client.commands.flags import add_connection, connection_of
from neo_client.commands.load import reports
from neo_client.connect import Connection
from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import engine_pb2_grpc, router_pb2_grpc
from protos.neo.v1 import router_pb2 as router

CALL_SECONDS = 15.0


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "drain",
        help="let a backend finish its requests and take no new ones",
        description="Asks a gpu_service, by itself or through its router, to take no new request. "
        "It stays up; stop it afterwards (SIGTERM drains as well).",
        allow_abbrev=False,
    )
    add_connection(parser, "the gpu_service, or of a router with --backend: their admin listener")
    parser.add_argument(
        "--backend",
        metavar="HOST:PORT",
        help="the router's backend to drain, as `neo load` shows it",
    )
    parser.add_argument(
        "--wait", action="store_true", help="end only when no request is live on it any more"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    connection = connection_of(arguments)
    with connection.open() as channel:
        live = drain(channel, connection, arguments.backend)
        target = arguments.backend or arguments.address
        print(f"{target} is draining; {live} requests are live")
        if arguments.wait:
            for backends in reports(channel, connection, 200):
                if not any(busy(b) for b in backends if b.address == target):
                    break
            print(f"{target} has finished")
    return 0


def drain(channel: grpc.Channel, connection: Connection, backend: str | None) -> int:
    """Requests live when the call was taken. Raises ValueError for a router without --backend."""
    limits: dict[str, Any] = {"timeout": CALL_SECONDS, "metadata": connection.metadata()}
    if backend is not None:
        operator: Any = router_pb2_grpc.RouterServiceStub(channel)
        request = router.DrainBackendRequest(address=backend)
        return int(operator.DrainBackend(request, **limits).live_requests)
    stub: Any = engine_pb2_grpc.EngineServiceStub(channel)
    try:
        return int(stub.Drain(engine.DrainRequest(), **limits).live_requests)
    except grpc.RpcError as error:
        status: Any = error
        if status.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise ValueError("this is a router: name its backend with --backend") from None
        raise


def busy(backend: router.Backend) -> bool:
    load = backend.load
    requests = load.gpu.running_requests + load.host.running_requests + load.waiting_requests
    return backend.state != router.BACKEND_STATE_DOWN and requests > 0
