"""Puts a router together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable

import grpc.aio

from neo_common import metrics
from neo_common.grpc.channel import peer_credentials, peer_options
from neo_common.grpc.keepalive import keepalive
from neo_common.grpc.server import ServiceServer
from neo_common.grpc.settings import admin_address
from neo_common.tracing import open_tracer
from protos.neo.v1 import router_pb2, router_pb2_grpc
from router import compat
from router.admission.gate import Admission
from router.admission.metrics import AdmissionMetrics
from router.attempts import RetryLimits
from router.backend import Backend
from router.chooser import Chooser
from router.config import RouterConfig
from router.discovery.follow import Discovery
from router.discovery.kubernetes import ApiServer
from router.discovery.targets import KubernetesTarget
from router.forward import SERVICE, Forwarder, RelayLimits
from router.http import http_listener
from router.joining import Pace
from router.limits import Gate
from router.load import WatchTiming
from router.metrics import RouterMetrics
from router.policies import POLICIES
from router.registry import Registry
from router.service import RouterServicer
from router.status.server import StatusPage

ROUTER_SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"]
DRAIN_CALL_SECONDS = 10.0

log = logging.getLogger("router")


def discovery(config: RouterConfig) -> Discovery:
    """Raises ValueError when the API server that it needs cannot be known."""
    targets = config.targets()
    api = None
    if any(isinstance(target, KubernetesTarget) for target in targets):
        api = ApiServer.of(config.kubernetes_api, config.kubernetes_account)
    return Discovery(targets, config.dns_interval_seconds, api)


def chooser(config: RouterConfig, chosen: Callable[[str, str, float], None]) -> Chooser:
    by_model = {model: POLICIES[name] for model, name in config.policies_by_model().items()}
    return Chooser(POLICIES[config.policy], by_model, config.default_model, chosen=chosen)


def relay_limits(config: RouterConfig) -> RelayLimits:
    return RelayLimits(
        retry=RetryLimits(
            max_attempts=config.max_attempts,
            ratio=config.retry_ratio,
            base_seconds=config.retry_base_ms / 1e3,
            max_seconds=config.retry_max_ms / 1e3,
            hedge_seconds=config.hedge_after_ms / 1e3,
        ),
        abort_seconds=config.abort_seconds,
        retry_after_seconds=config.retry_after_seconds,
    )


class Router:
    """One router. `start` it, `stop` it; used by one event loop."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.collector = metrics.service_registry("router")
        self._tracer = open_tracer("router", config)
        self._metrics = RouterMetrics(self.collector, tracer=self._tracer)
        self.discovery = discovery(config)
        self.registry = Registry(
            lambda address: Backend(
                address, self._channel(address), config.stale_seconds, config.health_limits()
            ),
            self.discovery.addresses,
            WatchTiming(
                interval_ms=config.load_interval_ms,
                silence_seconds=config.silence_seconds,
                backoff_seconds=config.reconnect_seconds,
                max_backoff_seconds=config.max_reconnect_seconds,
            ),
            chooser(config, self._metrics.chose),
            config.health_limits(),
        )
        self.admission = Admission(
            config.tenants, self.registry.room, AdmissionMetrics(self.collector)
        )
        self.pace = Pace(config.max_join_ms / 1e3)
        self.server = ServiceServer(
            config.listen,
            [SERVICE, *compat.SERVICES],
            counted=lambda method: (
                method.startswith(f"/{SERVICE.full_name}/") or method in compat.GENERATING
            ),
            settings=config,
            operators=(admin_address(config.listen, config.admin_listen), [ROUTER_SERVICE]),
        )
        forwarder = Forwarder(
            self.registry,
            Gate(config.max_calls, config.retry_after_seconds),
            self._metrics,
            relay_limits(config),
            self.admission,
            self.pace,
        )
        compatible = compat.handlers(forwarder, self.registry.usable, self.server.guard.admitted)
        self.server.grpc.add_generic_rpc_handlers((forwarder.handler(), *compatible))
        router_pb2_grpc.add_RouterServiceServicer_to_server(
            RouterServicer(self.registry, DRAIN_CALL_SECONDS), self.server.admin
        )
        self.http = None
        if config.http_listen:
            self.http = http_listener(
                config, forwarder, self.registry.usable, self.server, self.collector
            )
        self.status = StatusPage(lambda: self.registry.backends, self._metrics.recent)
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def _channel(self, address: str) -> grpc.aio.Channel:
        limit = self.config.max_message_mib << 20
        options = (
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            # Retries are the forwarder's, which knows other backends.
            ("grpc.enable_retries", 0),
            # So much is read of an answer that its client does not take. gRPC's own guess at what
            # the way holds grows to megabytes, for each stream.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 128 << 10),
            # Calls on a backend whose host has gone end within 20 s.
            *keepalive(10.0, 10.0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", round(self.config.max_reconnect_seconds * 1000)),
            # Two routers in one process (tests) must not share connections.
            ("grpc.use_local_subchannel_pool", 1),
            *peer_options(self.config),
        )
        credentials = peer_credentials(self.config)
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)

    async def start(self) -> str:
        """Listen and watch the backends; returns the address. Raises ValueError."""
        address = await self.server.start()
        if self.http is not None:
            try:
                log.info("HTTP on %s", await self.http.start())
            except ValueError:
                await self.server.stop()
                raise
        self.registry.on_change(self._news.set)
        if self.admission.on:
            self.registry.on_change(self.admission.turn)
        self.registry.start()
        self.discovery.start(self.registry.apply)
        self.pace.start()
        self._tasks.append(asyncio.create_task(self._follow_backends(), name="health"))
        if self.config.status_port:
            self._tasks.append(asyncio.create_task(self.status.run(), name="status"))
        log.info("listening on %s, backends %s", address, ", ".join(self.config.backends))
        return address

    async def _follow_backends(self) -> None:
        """Healthy while at least one backend can take calls."""
        serving = False
        while True:
            await self._news.wait()
            self._news.clear()
            self._metrics.update(self.registry.backends, time.monotonic())
            if self.server.guard.draining or self.registry.usable() == serving:
                continue
            serving = not serving
            await self.server.set_serving(serving)
            log.info("serving" if serving else "not serving: no backend can take calls")

    async def stop(self) -> bool:
        """Drain, then let go of everything; False when calls outlived the grace."""
        finished = await self.server.drain(self.config.drain_grace_seconds)
        if self.http is not None:
            await self.http.stop()
        await self.discovery.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.registry.close()
        await asyncio.to_thread(self._tracer.close)
        self.pace.stop()
        return finished


@contextlib.asynccontextmanager
async def running(config: RouterConfig) -> AsyncIterator[Router]:
    """A started router; stopped when the block ends."""
    router = Router(config)
    await router.start()
    try:
        yield router
    finally:
        await router.stop()


async def serve(config: RouterConfig) -> None:
    """Until SIGTERM or SIGINT. Raises ValueError when it cannot start."""
    router = Router(config)
    with (
        metrics.endpoint(router.collector, config.metrics_port),
        router.status.serve(config.status_port),
    ):
        await router.start()
        # What is there now stays: looking through it again and again, the collector would hold up
        # every call for milliseconds.
        gc.collect()
        gc.freeze()
        await router.server.wait_for_stop_signal()
        log.info("draining, for at most %g s", config.drain_grace_seconds)
        if not await router.stop():
            log.warning("some calls outlived the grace and were cut")
