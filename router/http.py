"""Plugs OpenAI's API into the router: its calls go the way that gRPC clients' calls go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

from prometheus_client import CollectorRegistry

from neo_common.grpc.server import ServiceServer
from neo_http.app import Parts
from neo_http.call import HttpCall
from neo_http.listener import HttpListener
from neo_http.metrics import HttpMetrics
from router.config import RouterConfig
from router.forward import LISTING, SERVICE, Forwarder
from router.relay import Context


def http_listener(
    config: RouterConfig,
    forwarder: Forwarder,
    usable: Callable[[], bool],
    server: ServiceServer,
    collector: CollectorRegistry,
) -> HttpListener:
    """usable: whether a backend can take calls. Raises ValueError for key files."""

    listing = {path: forwarder.listed(path) for path in map(_path, LISTING)}

    async def inference(
        method: str, request: bytes, call: HttpCall, send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        path, context = _path(method), cast(Context, call)
        if path in listing:
            await send(await listing[path](request, context))
        elif failure := await forwarder.relay(path, request, context, send):
            await failure.refuse(context)

    parts = Parts(
        inference=inference,
        access=server.access,
        admitted=server.guard.admitted,
        healthy=usable,
        settings=config,
        metrics=HttpMetrics(collector),
    )
    return HttpListener(parts, config.tls, config.max_connection_age_seconds)


def _path(method: str) -> str:
    return f"/{SERVICE.full_name}/{method}"
