"""One epoch of a session with the shm transport: control and step memory, the worker on them, the
tether."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Callable, Sequence

from cpu_service.epoch import EpochStats, ThreadPlan
from cpu_service.spec import SessionSpec
from kernels.cpu.dataplane import NONCE_BYTES, StepMemory, Worker, WorkerOptions
from neo_common.errors import Reason, ServiceError
from neo_common.shm.handoff import HandoffServer, Offer
from neo_common.shm.memory import SharedMemory
from protos.neo.v1 import cpu_attention_pb2 as pb


class ShmEpoch:
    """Made when the session is opened or resumed, started by `ready`, ended by `stop`.

    All methods are called from the event loop."""

    def __init__(
        self,
        spec: SessionSpec,
        number: int,
        pool: SharedMemory | None,
        handoff: HandoffServer,
        plan: ThreadPlan,
        released: Callable[[], None],
    ) -> None:
        """`pool`: None when the engine is to hand it over. `released` is called when the engine has
        let go of the tether, or is dead. Raises OSError when there is no memory."""
        self.number = number
        self.ended = asyncio.Event()
        self.pool = pool
        self._spec = spec
        self._plan = plan
        self._handoff = handoff
        self._nonce = os.urandom(NONCE_BYTES)
        self._worker: Worker | None = None
        self._stopping: asyncio.Task[None] | None = None
        control_bytes, step_bytes = spec.step.sizes()
        self._control = SharedMemory.create("neo-control", control_bytes)
        try:
            self._step = SharedMemory.create("neo-step", step_bytes)
        except OSError:
            self._control.close()
            raise
        self._memory: StepMemory | None = StepMemory(
            spec.step, self._control.buffer, self._step.buffer
        )
        self._memory.format(number, self._nonce)
        self._last_stats = EpochStats()
        self._offer: Offer = handoff.offer(self._take, released)

    def describe(self, opened: pb.SessionOpened) -> None:
        """Fill in what the engine needs to fetch the memory."""
        opened.handoff_socket = str(self._handoff.path)
        opened.handoff_token = self._offer.token
        opened.control_bytes = self._control.size
        opened.step_bytes = self._step.size
        opened.nonce = self._nonce

    def _take(self, given: list[int]) -> Sequence[int]:
        """The engine fetches: control, step and, unless it holds the pool already, the pool."""
        for extra in given[1:]:
            os.close(extra)
        if self.ended.is_set():
            for fd in given[:1]:
                os.close(fd)
            raise ValueError("the epoch is over")
        if given:
            handed = SharedMemory.adopt(given[0], self._spec.pool_bytes)
            if self.pool is None:
                self.pool = handed
            else:
                same = handed.identity() == self.pool.identity()
                handed.close()
                if not same:
                    raise ValueError("the pool handed over is not this session's")
        if self.pool is None:
            raise ValueError(
                "this cpu_service does not hold the pool; the engine must hand it over"
            )
        fds = [self._control.fd, self._step.fd]
        return fds if given else [*fds, self.pool.fd]

    def ready(self, nonce: bytes) -> None:
        """The engine has mapped everything: start to serve. Raises ServiceError when it has not."""
        if self._memory is None or not self._offer.fetched or self.pool is None:
            raise ServiceError(
                Reason.FAILED_PRECONDITION, "the memory was not fetched from the handoff socket yet"
            )
        if not hmac.compare_digest(self._memory.read_engine_nonce(), nonce):
            raise ServiceError(
                Reason.NOT_COLOCATED,
                "the engine's nonce is not in the control memory: the two sides do not share it",
            )
        options = WorkerOptions(
            kv_dtype=self._spec.layout.dtype,
            blocks=self._spec.blocks,
            scale=self._spec.scale,
            softcap=self._spec.softcap,
            windows=self._spec.windows,
            threads=self._plan.threads,
            cpus=self._plan.cpus,
            spin_us=self._plan.spin_us,
        )
        self._worker = Worker(self._memory, self.pool.buffer, options)
        self._worker.start()

    def stats(self) -> EpochStats:
        if self._worker is not None:
            stats = self._worker.stats()
            self._last_stats = EpochStats(**vars(stats))
        return self._last_stats

    async def stop(self) -> None:
        """Nothing of the engine's memory is touched after this; the tether's end says so.
        Idempotent."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        # A caller that is cancelled must not leave the worker running.
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self.ended.set()
        self._handoff.withdraw(self._offer)
        if self._worker is not None:
            # Takes as long as the layer in work; the loop goes on.
            await asyncio.to_thread(self._worker.stop)
            self.stats()
        self._offer.end()
        # Both pin the mappings.
        self._worker = None
        self._memory = None
        self._control.close()
        self._step.close()
