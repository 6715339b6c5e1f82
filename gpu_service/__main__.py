"""`python -m gpu_service`: the front end process, which starts the engine core.

Exit codes: 0 after a drain; 1 when the engine core died; 2 when the service refused to start.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import uuid
from pathlib import Path

import uvloop

from gpu_service.config import GpuServiceConfig
from gpu_service.engine.client import EngineClient, EngineStartError
from gpu_service.engine.messages import Progress, Ready, Shutdown
from gpu_service.frontend import compat
from gpu_service.frontend.dispatch import Dispatcher
from gpu_service.frontend.health import HealthReporter
from gpu_service.frontend.http import http_listener
from gpu_service.frontend.inference import InferenceServicer
from gpu_service.frontend.metrics import FrontendMetrics
from gpu_service.frontend.operator import EngineServicer
from gpu_service.frontend.validate import ServedModel
from gpu_service.model.spec import read_spec
from gpu_service.model.tokenizer import load_tokenizer
from neo_common import logging as neo_logging
from neo_common import metrics as neo_metrics
from neo_common.config import dump, fail, load_or_exit
from neo_common.grpc.server import ServiceServer
from neo_common.grpc.settings import admin_address
from neo_common.machine.report import MachineCollector, MachineServicer, load
from neo_common.tracing import open_tracer
from neo_common.version import version
from neo_http.listener import HttpListener
from protos.neo.v1 import (
    engine_pb2,
    engine_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    machine_pb2,
    machine_pb2_grpc,
)

PROG = "gpu_service"
EXIT_ENGINE_LOST = 1
ENGINE_STOP_SECONDS = 10.0
_log = logging.getLogger(__name__)


class GpuService:
    """One front end with its server and its engine core."""

    def __init__(self, config: GpuServiceConfig, client: EngineClient | None = None) -> None:
        """client: of an engine core that is not started yet; None makes one of `config`."""
        self._config = config
        self._machine = load(config.machine_report)
        self._spec = read_spec(config.model)
        self._tokenizer = load_tokenizer(config.model)
        self._name = config.served_model_name or _model_name(config.model)
        self._engine = client or EngineClient(config)
        self._metrics = FrontendMetrics(self._name, self._spec.max_context_tokens)
        self._metrics.registry.register(MachineCollector(self._machine))
        self._dispatcher = Dispatcher(self._engine, self._tokenizer, self._metrics)
        self._tracer = open_tracer(PROG, config)
        self._inference = InferenceServicer(
            self._spec, self._tokenizer, self._dispatcher, self._metrics, self._tracer
        )
        self._info = engine_pb2.GetInfoResponse(
            version=version(),
            instance_id=uuid.uuid4().hex,
            model=self._name,
            offload=config.offload,
            host_kv_dtype=config.host_kv_dtype,
            config=dump(config),
        )
        inference = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
        engine = engine_pb2.DESCRIPTOR.services_by_name["EngineService"]
        machine = machine_pb2.DESCRIPTOR.services_by_name["MachineService"]
        generating = {f"/{inference.full_name}/{name}" for name in ("Generate", "GenerateStream")}
        generating.update(compat.GENERATING)
        self._server = ServiceServer(
            config.listen,
            [inference, engine, machine, *compat.SERVICES],
            counted=generating.__contains__,
            settings=config,
            operators=(admin_address(config.listen, config.admin_listen), [engine, machine]),
        )
        self._operator = EngineServicer(
            self._dispatcher, self._info, self._begin_drain, config.max_waiting_requests
        )
        self._http = self._http_listener() if config.http_listen else None
        self._draining: asyncio.Task[None] | None = None
        # Requests on the host tier wait for a lease, in silence, when all the others have ended.
        patience = (
            config.engine_stall_seconds and config.engine_stall_seconds + config.lease_seconds
        )
        self._health = HealthReporter(self._server.health, self._dispatcher, patience)

    def _http_listener(self) -> HttpListener:
        def serving() -> bool:
            return self._operator.state == engine_pb2.ENGINE_STATE_SERVING

        registry = self._metrics.registry
        return http_listener(self._config, self._inference, self._server, serving, registry)

    async def run(self) -> int:
        """Serve until a signal or the engine's end; returns the exit code. Raises ValueError or
        EngineStartError, one sentence, when the service cannot start."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            self._inference, self._server.grpc
        )
        for server in {self._server.grpc, self._server.admin}:
            engine_pb2_grpc.add_EngineServiceServicer_to_server(self._operator, server)
            machine_pb2_grpc.add_MachineServiceServicer_to_server(
                MachineServicer(self._machine), server
            )
        compat.add_compatible_services(
            self._server,
            self._inference,
            self._operator,
            self._config,
            self._tokenizer,
            self._spec,
            self._info,
        )
        with neo_metrics.endpoint(self._metrics.registry, self._config.metrics_port):
            address = await self._server.start()
            _log.info("listening on %s; loading %s", address, self._name)
            try:
                if self._http is not None:
                    _log.info("HTTP on %s", await self._http.start())
                return await self._serve()
            finally:
                await self._engine.stop(grace_seconds=0)
                if self._http is not None:
                    await self._http.stop()
                await self._server.stop()
                await asyncio.to_thread(self._tracer.close)

    async def _serve(self) -> int:
        stopping = asyncio.create_task(self._server.wait_for_stop_signal())
        starting = asyncio.create_task(self._engine.start(_log_progress))
        await asyncio.wait({stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # told to stop while loading
            starting.cancel()
            await asyncio.wait({starting})
            return 0
        await self._ready(starting.result())
        pump = asyncio.create_task(self._dispatcher.run())
        reporting = asyncio.create_task(self._health.run())
        try:
            return await self._until_stopped(stopping, pump)
        finally:
            reporting.cancel()

    async def _until_stopped(self, stopping: asyncio.Task[None], pump: asyncio.Task[str]) -> int:
        await asyncio.wait({stopping, pump}, return_when=asyncio.FIRST_COMPLETED)
        if pump.done():
            how = pump.result() or "the engine core has ended"
            _log.error("%s; ending, so that a supervisor starts this service again", how)
            await self._server.drain(1.0)
            return EXIT_ENGINE_LOST
        _log.info("draining: up to %.0f s for live requests", self._config.drain_grace_seconds)
        self._operator.state = engine_pb2.ENGINE_STATE_DRAINING
        finished = await self._server.drain(self._config.drain_grace_seconds)
        _log.info("drained" if finished else "the grace is over; live requests were cancelled")
        # The core ends by itself, which ends the pump; only then may its sockets be closed.
        await self._engine.send(Shutdown())
        await asyncio.wait({pump}, timeout=ENGINE_STOP_SECONDS)
        if pump.done() and pump.result():
            _log.error("%s, while this service drained", pump.result())
            return EXIT_ENGINE_LOST
        pump.cancel()
        return 0

    async def _ready(self, ready: Ready) -> None:
        self._metrics.engine.ready(ready, self._config)
        self._info.device = ready.device
        self._info.device_name = ready.device_name
        self._info.dtype = ready.dtype
        self._info.offload_transport = ready.offload_transport
        self._info.max_context_tokens = ready.max_context_tokens
        self._inference.ready(
            ServedModel(self._name, self._spec.vocab_size, ready.max_context_tokens), ready.dtype
        )
        if self._draining is None:  # nobody asked for it while the model was loading
            self._operator.state = engine_pb2.ENGINE_STATE_SERVING
            await self._server.set_serving(True)
        _log.info(
            "serving %s: %d GPU blocks, %d host blocks of %d tokens",
            self._name,
            ready.gpu_blocks,
            ready.host_blocks,
            ready.block_tokens,
        )

    def _begin_drain(self) -> None:
        """EngineService.Drain: refuse new requests; the process stays until it is told to end."""
        if self._draining is None:
            self._operator.state = engine_pb2.ENGINE_STATE_DRAINING
            self._server.begin_drain()
            self._draining = asyncio.create_task(self._server.set_serving(False))


def _model_name(model: str) -> str:
    """The last part of the path, without the ending of a GGUF file."""
    return Path(model).name.removesuffix(".gguf")


def _log_progress(progress: Progress) -> None:
    done, total = progress.done_bytes / 2**20, progress.total_bytes / 2**20
    _log.info("%s: %.0f of %.0f MiB", progress.stage, done, total)


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    config = load_or_exit(
        GpuServiceConfig,
        sys.argv[1:] if argv is None else argv,
        prog=f"python -m {PROG}",
        description="Dense layers, GPU attention and the scheduler, behind gRPC.",
    )
    try:
        neo_logging.setup(PROG, config.log_level, config.log_format)

        async def run() -> int:
            return await GpuService(config).run()

        code = uvloop.run(run())
    except (ValueError, EngineStartError) as error:
        fail(PROG, str(error))
    _log.info("ended after %.1f s", time.monotonic() - started)
    return code


if __name__ == "__main__":
    sys.exit(main())
