"""Sessions: opened, resumed under a higher epoch, kept over disconnects for as long as their lease,
closed or expired."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from cpu_service.config import CpuServiceConfig
from cpu_service.epoch import Epoch, EpochStats, ThreadPlan
from cpu_service.grpc_epoch import GrpcEpoch
from cpu_service.pool import GIB, PoolBudget, allocate_pool
from cpu_service.shm_epoch import ShmEpoch
from cpu_service.spec import SessionSpec, read_spec
from neo_common.errors import Reason, ServiceError
from neo_common.shm.handoff import HandoffServer
from neo_common.shm.memory import SharedMemory
from protos.neo.v1 import cpu_attention_pb2 as pb

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass
class Session:
    """One engine's host tier. `epoch` is None only while a resume replaces it."""

    spec: SessionSpec
    number: int
    pool: SharedMemory | None
    """None until a resuming engine has handed it over."""
    epoch: Epoch | None = None
    last_seen: float = 0.0
    expiry: asyncio.TimerHandle | None = None

    def expires_at(self) -> float:
        return self.last_seen + self.spec.lease_seconds


class SessionTable:
    """All sessions of this process; used from the event loop alone."""

    def __init__(
        self,
        config: CpuServiceConfig,
        handoff: HandoffServer,
        plan: ThreadPlan,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.draining = False
        self.budget = PoolBudget(int(config.max_pool_gib * GIB))
        self._config = config
        self._handoff = handoff
        self._plan = plan
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._opening = asyncio.Lock()
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._past = EpochStats()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def threads(self) -> int:
        """Attention threads of each session."""
        return self._plan.threads

    def totals(self) -> EpochStats:
        """Over all epochs since the process started. Any thread."""
        live = [session.epoch for session in list(self._sessions.values())]
        return sum((epoch.stats() for epoch in live if epoch is not None), self._past)

    async def open(self, request: pb.OpenSession) -> tuple[Session, Epoch, bool]:
        """A new session, or the next epoch of one; the flag says whether its KV is kept. Raises
        ServiceError."""
        spec = read_spec(request, self._config)
        # One at a time: memory is checked, then taken. Shielded: a client that goes away in the
        # middle must not leave a pool that nobody owns. Its session then ends by lease.
        return await asyncio.shield(self._keep(self._open(request, spec)))

    def _keep(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """A task that nobody's cancellation ends; the loop alone would not keep it alive."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _open(
        self, request: pb.OpenSession, spec: SessionSpec
    ) -> tuple[Session, Epoch, bool]:
        async with self._opening:
            if self.draining:
                raise ServiceError(Reason.DRAINING, "this cpu_service is shutting down")
            session = self._sessions.get(spec.session_id)
            kept = session is not None
            if session is None:
                session, kept = await self._create(request, spec)
            else:
                await self._supersede(session, request, spec)
            session.number = request.epoch
            session.epoch = self._new_epoch(session)
            self.renew(session)
            return session, session.epoch, kept

    async def _create(self, request: pb.OpenSession, spec: SessionSpec) -> tuple[Session, bool]:
        if len(self._sessions) >= self._config.max_sessions:
            raise ServiceError(
                Reason.TOO_MANY_SESSIONS,
                f"max_sessions: this cpu_service serves {self._config.max_sessions} already",
            )
        handed_over = request.resume and spec.transport == pb.TRANSPORT_SHM
        self.budget.take(spec.pool_bytes, spec.work_bytes, exists=handed_over)
        pool = None
        try:
            if not handed_over:
                pool = await asyncio.to_thread(
                    allocate_pool, spec.pool_bytes, self._plan.threads, self._plan.cpus
                )
        except MemoryError as error:
            self.budget.give_back(spec.pool_bytes)
            raise ServiceError(
                Reason.OUT_OF_HOST_MEMORY, f"the host pool cannot be allocated: {error}"
            ) from error
        except BaseException:
            self.budget.give_back(spec.pool_bytes)
            raise
        session = Session(spec, request.epoch, pool)
        self._sessions[spec.session_id] = session
        self._empty.clear()
        return session, handed_over

    async def _supersede(
        self, session: Session, request: pb.OpenSession, spec: SessionSpec
    ) -> None:
        if not request.resume:
            raise ServiceError(Reason.SESSION_EXISTS, "session_id is in use", field="session_id")
        if request.epoch <= session.number:
            raise ServiceError(
                Reason.STALE_EPOCH,
                f"epoch {request.epoch} is not above the session's {session.number}",
                field="epoch",
            )
        if spec != session.spec:
            raise ServiceError(
                Reason.FAILED_PRECONDITION,
                "a resumed session must keep its shape and terms",
                field="shape",
            )
        if session.epoch is not None:
            await self._stop_epoch(session)

    def _new_epoch(self, session: Session) -> Epoch:
        try:
            if session.spec.transport == pb.TRANSPORT_SHM:
                number = session.number
                return ShmEpoch(
                    session.spec,
                    number,
                    session.pool,
                    self._handoff,
                    self._plan,
                    released=lambda: self._released(session, number),
                )
            assert session.pool is not None
            return GrpcEpoch(session.spec, session.number, session.pool, self._plan)
        except Exception as error:
            # No lease runs yet that would end the session.
            self._forget(session)
            if not isinstance(error, OSError | MemoryError | RuntimeError):
                raise
            # RuntimeError: the system starts no more threads.
            raise ServiceError(
                Reason.OUT_OF_HOST_MEMORY, f"step memory or threads cannot be had: {error}"
            ) from error

    async def _stop_epoch(self, session: Session) -> None:
        epoch, session.epoch = session.epoch, None
        if epoch is None:
            return
        await epoch.stop()
        self._past += epoch.stats().ended()
        if isinstance(epoch, ShmEpoch) and session.pool is None:
            session.pool = epoch.pool  # handed over during that epoch

    def renew(self, session: Session) -> None:
        """The engine has shown that it lives."""
        session.last_seen = self._clock()
        if session.expiry is None:
            self._arm(session)

    def _arm(self, session: Session) -> None:
        delay = max(session.expires_at() - self._clock(), 0.0)
        session.expiry = asyncio.get_running_loop().call_later(delay, self._check, session)

    def _check(self, session: Session) -> None:
        session.expiry = None
        if session.spec.session_id not in self._sessions:
            return
        if self._clock() < session.expires_at():
            self._arm(session)
            return
        _log.warning("session %s: lease expired, freeing it", session.spec.session_id[:8])
        self._keep(self.end(session, session.number))

    def _released(self, session: Session, number: int) -> None:
        """The engine is dead, or has given the epoch up. Nothing is lost by not waiting for the
        lease: an engine that lives holds the pool's descriptor and resumes with it."""
        if session.number == number:
            _log.info("session %s: released by its engine", session.spec.session_id[:8])
            self._keep(self.end(session, number))

    def abandon(self, session: Session, number: int) -> None:
        """Nobody will resume what was opened as epoch `number`."""
        self._keep(self.end(session, number))

    async def end(self, session: Session, number: int | None = None) -> None:
        """Free everything, unless the session has got beyond epoch `number`. Idempotent."""
        async with self._opening:
            if self._sessions.get(session.spec.session_id) is not session:
                return
            if number is not None and session.number != number:
                return  # resumed while this was waiting for its turn
            await self._stop_epoch(session)
            self._forget(session)

    def _forget(self, session: Session) -> None:
        del self._sessions[session.spec.session_id]
        if session.expiry is not None:
            session.expiry.cancel()
        if session.pool is not None:
            session.pool.close()
        self.budget.give_back(session.spec.pool_bytes)
        if not self._sessions:
            self._empty.set()

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new sessions, wait for the others to close, then end those that did not."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), grace_seconds)
        except TimeoutError:
            _log.warning("%d sessions are still open after the grace period", len(self))
        for session in list(self._sessions.values()):
            await self.end(session)
