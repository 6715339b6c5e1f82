"""CpuAttentionService: the control plane of sessions, thin over SessionTable and the two kinds of
epoch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc

from cpu_service.epoch import Epoch, ThreadPlan
from cpu_service.grpc_epoch import GrpcEpoch
from cpu_service.sessions import Session, SessionTable
from kernels import cpu
from neo_common.errors import Reason, ServiceError
from neo_common.grpc.guard import Malformed
from neo_common.shm.memory import boot_id
from protos.neo.v1 import cpu_attention_pb2 as pb
from protos.neo.v1 import cpu_attention_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)
_FIRST_MESSAGE_SECONDS = 10.0

Context = grpc.aio.ServicerContext[pb.AttendRequest, pb.AttendResponse]


async def _next(
    requests: AsyncIterator[pb.AttendRequest], ended: asyncio.Event
) -> pb.AttendRequest | None:
    """The stream's next message; None at its end, or when the epoch has ended in the meantime."""
    read = asyncio.ensure_future(anext(requests, None))
    over = asyncio.ensure_future(ended.wait())
    try:
        await asyncio.wait({read, over}, return_when=asyncio.FIRST_COMPLETED)
        return _checked(read.result()) if read.done() and not ended.is_set() else None
    finally:
        read.cancel()
        over.cancel()


def _checked(message: object) -> pb.AttendRequest | None:
    if isinstance(message, Malformed):
        raise message.error()
    assert message is None or isinstance(message, pb.AttendRequest)
    return message


class CpuAttentionServicer(pb_grpc.CpuAttentionServiceServicer):
    def __init__(self, table: SessionTable, plan: ThreadPlan, version: str, numa_node: int) -> None:
        self._table = table
        self._plan = plan
        self._version = version
        self._numa_node = numa_node

    async def GetCapabilities(
        self,
        request: pb.GetCapabilitiesRequest,
        context: grpc.aio.ServicerContext[pb.GetCapabilitiesRequest, pb.GetCapabilitiesResponse],
    ) -> pb.GetCapabilitiesResponse:
        return pb.GetCapabilitiesResponse(
            version=self._version,
            isa=cpu.isa(),
            isas=cpu.isas(),
            threads=self._plan.threads,
            transports=[pb.TRANSPORT_SHM, pb.TRANSPORT_GRPC],
            kv_dtypes=[pb.KvDtype.Name(dtype) for dtype in cpu.DType],
            pool_bytes_available=self._table.budget.available().bytes,
            layout_version=cpu.LAYOUT_VERSION,
            boot_id=boot_id(),
            numa_node=self._numa_node,
        )

    async def Attend(
        self, requests: AsyncIterator[pb.AttendRequest], context: Context
    ) -> AsyncIterator[pb.AttendResponse]:
        try:
            read = asyncio.wait_for(anext(requests, None), _FIRST_MESSAGE_SECONDS)
            first = _checked(await read)
        except TimeoutError:
            first = None
        if first is None or first.WhichOneof("message") != "open":
            raise ServiceError(
                Reason.INVALID_ARGUMENT, "the first message must be open", field="open"
            )
        session, epoch, resumed = await self._table.open(first.open)
        _log.info(
            "session %s: epoch %d %s",
            first.open.session_id[:8],
            epoch.number,
            "resumed" if resumed else "opened",
        )
        empty = not resumed
        try:
            yield self._opened(session, epoch, resumed)
            while (request := await _next(requests, epoch.ended)) is not None:
                self._table.renew(session)
                response = await self._handle(session, epoch, request)
                empty = empty and request.WhichOneof("message") != "mapped"
                if response is not None:
                    yield response
                if request.WhichOneof("message") == "close":
                    return
        except (asyncio.CancelledError, GeneratorExit):
            if empty:  # cut off before there was any KV to come back to
                self._table.abandon(session, epoch.number)
            raise
        if epoch.ended.is_set():
            raise ServiceError(
                Reason.DRAINING if self._table.draining else Reason.STALE_EPOCH,
                "this epoch of the session has ended",
            )

    def _opened(self, session: Session, epoch: Epoch, resumed: bool) -> pb.AttendResponse:
        opened = pb.SessionOpened(
            transport=session.spec.transport,
            pool_bytes=session.spec.pool_bytes,
            threads=self._plan.threads,
            isa=cpu.isa(),
            resumed=resumed,
        )
        epoch.describe(opened)
        return pb.AttendResponse(opened=opened)

    async def _handle(
        self, session: Session, epoch: Epoch, request: pb.AttendRequest
    ) -> pb.AttendResponse | None:
        kind = request.WhichOneof("message")
        if kind == "heartbeat":
            return self._stats(epoch, request.heartbeat.sequence)
        if kind == "mapped":
            epoch.ready(request.mapped.nonce)
            return pb.AttendResponse(ready=pb.Heartbeat())
        if kind == "close":
            await self._table.end(session)
            _log.info("session %s: closed", session.spec.session_id[:8])
            return pb.AttendResponse(closed=pb.SessionClosed())
        if kind in ("step", "write_kv", "read_kv") and isinstance(epoch, GrpcEpoch):
            return await epoch.run(request)
        raise ServiceError(
            Reason.INVALID_ARGUMENT,
            f"message {kind} does not belong here in this transport",
            field=kind,
        )

    @staticmethod
    def _stats(epoch: Epoch, sequence: int) -> pb.AttendResponse:
        stats = epoch.stats()
        return pb.AttendResponse(
            stats=pb.SessionStats(
                sequence=sequence,
                kv_bytes_read=stats.kv_bytes_read,
                rows=stats.rows,
                busy_seconds=stats.busy_seconds,
                sweeps=stats.sweeps,
            )
        )
