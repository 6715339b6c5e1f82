"""EngineService: load, drain and description, for routers and operators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from gpu_service.engine.messages import Foresight, Load, TierLoad
from gpu_service.frontend.dispatch import Dispatcher
from neo_common.errors import Reason, ServiceError
from protos.neo.v1 import engine_pb2 as pb
from protos.neo.v1 import engine_pb2_grpc as pb_grpc

DEFAULT_INTERVAL_MS = 200
Context = Any

_HOST_STATES = {
    "off": pb.HOST_TIER_STATE_OFF,
    "up": pb.HOST_TIER_STATE_UP,
    "degraded": pb.HOST_TIER_STATE_DEGRADED,
    "lost": pb.HOST_TIER_STATE_DEGRADED,
}


class EngineServicer(pb_grpc.EngineServiceServicer):
    """drain: begins the drain of the whole process. max_waiting: the queue's bound."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        info: pb.GetInfoResponse,
        drain: Callable[[], None],
        max_waiting: int,
    ) -> None:
        self._dispatcher = dispatcher
        self._info = info
        self._drain = drain
        self._max_waiting = max_waiting
        self._sequence = 0
        self.state: pb.EngineState = pb.ENGINE_STATE_STARTING

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(load=self.snapshot())

    async def WatchLoad(
        self, request: pb.WatchLoadRequest, context: Context
    ) -> AsyncIterator[pb.WatchLoadResponse]:
        interval = request.interval_ms or DEFAULT_INTERVAL_MS
        if not 10 <= interval <= 60_000:
            raise ServiceError(
                Reason.INVALID_ARGUMENT,
                f"interval_ms must be 10 to 60000, not {interval}",
                field="interval_ms",
            )
        while True:
            yield pb.WatchLoadResponse(load=self.snapshot())
            await asyncio.sleep(interval / 1e3)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        self._drain()
        return pb.DrainResponse(live_requests=self._dispatcher.live)

    async def ResetPrefixCache(
        self, request: pb.ResetPrefixCacheRequest, context: Context
    ) -> pb.ResetPrefixCacheResponse:
        await self._dispatcher.forget_prefixes()
        return pb.ResetPrefixCacheResponse()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        return self._info

    def snapshot(self) -> pb.LoadSnapshot:
        self._sequence += 1
        snapshot = pb.LoadSnapshot(
            state=self.state,
            max_waiting_requests=self._max_waiting,
            sequence=self._sequence,
            instance_id=self._info.instance_id,
            models=[self._info.model],
        )
        if self._dispatcher.load is not None:
            _fill(snapshot, self._dispatcher.load)
        if (counters := self._dispatcher.counters) is not None:
            snapshot.mode_seconds_total.update(counters.seconds)
            snapshot.device_busy_seconds_total = counters.device_busy_seconds
            snapshot.host_wait_seconds_total = counters.host_wait_seconds
            _fill_foresight(snapshot, counters.foresight)
        return snapshot


def _fill(snapshot: pb.LoadSnapshot, load: Load) -> None:
    snapshot.host_tier_state = _HOST_STATES[load.host_tier_state]
    snapshot.gpu.CopyFrom(_tier(load.gpu))
    snapshot.host.CopyFrom(_tier(load.host))
    for name in (
        "waiting_requests",
        "waiting_prompt_tokens",
        "block_tokens",
        "demotions_total",
        "promotions_total",
        "recomputations_total",
        "iterations_total",
        "iteration_seconds",
        "output_tokens_per_second",
        "prompt_tokens_per_second",
        "prefix_query_tokens_total",
        "prefix_hit_tokens_total",
        "prefix_host_hit_tokens_total",
    ):
        setattr(snapshot, name, getattr(load, name))


def _fill_foresight(snapshot: pb.LoadSnapshot, told: Foresight | None) -> None:
    if told is None:
        return
    snapshot.predicted_seconds_total.update(told.predicted_seconds)
    snapshot.predicted_sweeps_took_seconds_total = told.actual_seconds
    snapshot.prediction_error = told.error
    snapshot.host_busy_seconds_total = told.host_busy_seconds
    if told.mode:
        for name in pb.ModeDecision.DESCRIPTOR.fields_by_name:
            setattr(snapshot.decision, name, getattr(told, name))


def _tier(load: TierLoad) -> pb.TierLoad:
    return pb.TierLoad(
        total_blocks=load.total_blocks,
        free_blocks=load.free_blocks,
        running_requests=load.running_requests,
        tokens_total=load.tokens_total,
        freed_tokens_per_second=load.freed_tokens_per_second,
        token_seconds=load.token_seconds,
    )
