"""The host tier as CUDA sweeps use it: KV moves as kernels, and rows that the device itself submits
and waits for. The engine's thread says who they are, and hears how it went.

A deferred sweep is launched before the one before it has ended: whether the host came in time is
known one sweep late. Then all that is under way has come to nothing, what has started meanwhile
included. Host rows that are waited for in their own sweep are known to be void, or not, before the
next sweep is decided.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu_service.offload.host_tier import HostRows, HostTierStalled, HostTierState
from gpu_service.offload.session_tier import TORCH_DTYPES
from gpu_service.offload.shm_tier import ShmHostTier
from gpu_service.pipeline.batch import decode_tables
from gpu_service.pipeline.cohorts import Cohort, host_rows, no_tables
from gpu_service.pipeline.cuda.branch import Branch
from gpu_service.pipeline.cuda.forward import DeviceCache
from gpu_service.pipeline.cuda.host_ring import Longs
from gpu_service.pipeline.cuda.inputs import HostInputs
from gpu_service.pipeline.cuda.registered import RegisteredSession
from gpu_service.pipeline.cuda.staging import Ints
from gpu_service.scheduling.plan import (
    DecodeRow,
    Flight,
    IterationPlan,
    Mode,
    SubBatch,
    Tier,
)
from kernels.cpu import DType
from kernels.gpu.host_exchange import HostExchange, StepOffsets
from kernels.gpu.host_pieces import HostPieces

Ids = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True)
class HostSweep:
    """The host's part of a sweep that is about to run."""

    inputs: HostInputs
    epoch: int
    finishing: Cohort | None
    """Deferred mode: its rows come through the last layer; in this order they are the sweep's last
    samples. None: `inputs.lanes` are."""


_LOG = logging.getLogger(__name__)


class HostSide:
    """Used by the engine core's thread."""

    def __init__(self, tier: ShmHostTier, exchange: HostExchange, cache: DeviceCache) -> None:
        self._tier = tier
        self._exchange = exchange
        self._cache = cache
        layout = tier.layout
        dtype = torch.int8 if layout.dtype == DType.INT8 else TORCH_DTYPES[layout.dtype]
        self._pieces = HostPieces(cache.layout, dtype)
        assert self._pieces.piece_bytes == layout.piece_bytes
        assert StepOffsets(*tier.step_shape.offsets()) == exchange.offsets
        self._registered: RegisteredSession | None = None
        self._copies = Branch(cache.memory.device, first=True)
        self._nobody = Cohort((), no_tables())
        self._waiting = [self._nobody] * cache.layout.layers
        """Cohorts by the layer whose attention they wait for."""
        self._under_way: dict[Flight, None] = {}
        self._published = 0
        """Epoch of the last sweep that the host was told of."""
        self._status = [torch.zeros_like(exchange.status, device="cpu") for _ in "ab"]
        if exchange.status.is_cuda:
            self._status = [status.pin_memory() for status in self._status]
        self._turn = 0
        if tier.state is HostTierState.UP and self._session() is None:
            raise ValueError("the host pool cannot be registered with CUDA; see the log")
        self._compile()

    def _compile(self) -> None:
        """The kernels of migrations, of which the first would else hold a sweep up for 0.4 s."""
        if self._registered is not None and self._cache.memory.is_cuda:
            nobody = np.array([-1], np.int32)
            for target in Tier:
                self._move(self._registered, target, nobody + 1, nobody)

    # -- KV ----------------------------------------------------------------------------------

    def join_copies(self) -> None:
        """What is queued from now on comes after the copies beside the sweep before."""
        self._copies.join()

    def migrate(self, plan: IterationPlan) -> frozenset[int]:
        """Queue the copies, in their order: on a branch if the sweep need not wait for them, until
        `join_copies`. Returns the choices whose KV is on neither tier, since the host has gone."""
        lost = set()
        for migration in plan.migrations:
            registered = self._session()
            if registered is None:
                lost.add(migration.key)
                continue
            blocks = migration.source_blocks, migration.target_blocks
            on_device, on_host = blocks if migration.target is Tier.HOST else blocks[::-1]
            with self._copies.forked(plan.copies_beside):
                self._move(registered, migration.target, on_device, on_host)
        return frozenset(lost)

    def _move(self, registered: RegisteredSession, target: Tier, blocks: Ids, host: Ids) -> None:
        layers, cache = self._cache.layout.layers, self._cache.memory
        pool = registered.pool(layers, self._tier.blocks, self._pieces.piece_bytes)
        on_device, on_host = self._on_device(blocks), self._on_device(host)
        if target is Tier.HOST:
            self._pieces.write(cache, on_device, pool, on_host)
        else:
            self._pieces.read(pool, on_host, cache, on_device)

    def _on_device(self, blocks: Ids) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(blocks, np.int32))
        device = self._cache.memory.device
        if device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(device, non_blocking=True)

    def pool(self) -> Longs | None:
        """Where the host pool is and how long a layer of it, for what goes through staging. Needs
        the memory alone, which stays while the host is away; None if it was never registered."""
        registered = self._session() or self._registered
        if registered is None:
            return None
        layer_bytes = self._tier.blocks * self._pieces.piece_bytes
        return np.array([registered.session.pool[0], layer_bytes], np.int64)

    # -- sweeps ------------------------------------------------------------------------------

    def begin(self, plan: IterationPlan) -> HostSweep | None:
        """Publish a sweep's host rows. None if the host is away: deferred, all under way is lost;
        else those rows are void."""
        if plan.mode is Mode.DEFERRED:
            (batch,) = plan.batches or (SubBatch(),)
            return self._begin_deferred(plan.number, batch.host_decode)
        return self._begin_waited([batch.host_decode for batch in plan.batches])

    def _begin_waited(self, lanes: Sequence[Sequence[DecodeRow]]) -> HostSweep | None:
        registered = self._session()
        if registered is None:
            return None
        size = self._cache.layout.block_tokens
        tables = [decode_tables(lane, size) or no_tables() for lane in lanes]
        rows = [HostRows(table.lengths, table.block_tables) for table in tables]
        sweep = self._publish(registered, rows)
        if sweep is None:
            return None
        # No sweep with host rows is unfinished: the status is this one's alone.
        self._exchange.status.zero_()
        counts = np.zeros(self._cache.layout.layers + 2, np.int32)
        counts[: len(lanes)] = [len(lane) for lane in lanes]
        return HostSweep(
            self._inputs(registered, lanes, counts, sweep, None), registered.session.epoch, None
        )

    def _begin_deferred(self, number: int, rows: Sequence[DecodeRow]) -> HostSweep | None:
        tables = decode_tables(rows, self._cache.layout.block_tokens)
        flights = tuple(Flight(row.key, number) for row in rows)
        starting = Cohort(flights, tables) if tables else self._nobody
        assert len(flights) <= self._exchange.rows
        before = self._registered
        self._under_way.update(dict.fromkeys(flights))
        registered = self._session()
        elsewhere = before is not registered and any(cohort.flights for cohort in self._waiting)
        if registered is None or elsewhere:
            return None
        cohorts = [starting, *self._waiting]
        # The cohort that waits for the last layer submits no more.
        submitting = host_rows(cohorts[:-1], self._cache.layout.block_tokens)
        sweep = self._publish(registered, [submitting])
        if sweep is None:
            return None
        if not any(cohort.flights for cohort in self._waiting):
            self._exchange.status.zero_()
        self._waiting = cohorts[:-1]
        counts = np.array([*(len(cohort.flights) for cohort in cohorts), 0], np.int32)
        inputs = self._inputs(registered, [rows], counts, sweep, self._positions(cohorts[:-1]))
        return HostSweep(inputs, registered.session.epoch, cohorts[-1])

    def _publish(self, registered: RegisteredSession, lanes: Sequence[HostRows]) -> int | None:
        """Number of the sweep; None if the host is away."""
        try:
            sweep = self._tier.publish(lanes)
        except HostTierStalled:
            return None
        self._published = registered.session.epoch
        return sweep

    def _positions(self, leaving: Sequence[Cohort]) -> Ints:
        positions = np.zeros((len(leaving), self._exchange.rows), np.int32)
        for layer, cohort in enumerate(leaving):
            positions[layer, : len(cohort.flights)] = cohort.tables.lengths - 1
        return positions

    def _inputs(
        self,
        registered: RegisteredSession,
        lanes: Sequence[Sequence[DecodeRow]],
        counts: Ids,
        sweep: int,
        positions: Ints | None,
    ) -> HostInputs:
        counts.view(np.uint32)[-1] = sweep
        session = registered.session
        bases = np.array([session.control[0], session.step[0]], np.int64)
        return HostInputs(lanes, counts, bases, positions)

    def send_status(self) -> torch.Tensor:
        """Behind a sweep: how it went, once the device has come to here."""
        self._turn ^= 1
        landing = self._status[self._turn]
        landing.copy_(self._exchange.status, non_blocking=True)
        return landing

    def landed(self, sweep: HostSweep, status: torch.Tensor) -> tuple[Flight, ...] | None:
        """Deferred rows that have come through; None if the host came too late: all under way is
        lost, or the sweep's host rows are void."""
        if int(status) and self._tier.epoch != sweep.epoch:
            return None
        if int(status):
            self._tier.give_up("the cpu_service did not answer a sweep of the device in time")
            return None
        finishing = sweep.finishing or self._nobody
        here = tuple(f for f in finishing.flights if f in self._under_way)
        for flight in here:
            del self._under_way[flight]
        return here

    def lose(self, unlaunched: HostSweep | None = None) -> tuple[Flight, ...]:
        """All that is under way, which will not come. The epoch that it is in ends with it, and
        with one that was begun and is not launched: else the host would go on with these rows,
        whose blocks are others' from here on, or wait for a sweep that was never launched and take
        the next one's doorbells for it."""
        lost = tuple(self._under_way)
        if (lost or unlaunched is not None) and self._tier.epoch == self._published:
            self._tier.give_up("rows that it had were given up")
        self._under_way.clear()
        self._waiting = [self._nobody] * len(self._waiting)
        return lost

    def close(self) -> None:
        """Before the tier unmaps its memory: a mapping that came to its place would be taken for
        it."""
        if self._registered is not None:
            self._let_go(self._registered)
            self._registered = None

    def _let_go(self, registered: RegisteredSession) -> None:
        if self._cache.memory.is_cuda:
            torch.cuda.synchronize(self._cache.memory.device)
        registered.close()

    def _session(self) -> RegisteredSession | None:
        """The memory to work on now; None while the host tier is away."""
        if self._tier.state is not HostTierState.UP:
            return None
        session = self._tier.session
        assert session is not None
        known = self._registered
        if known is not None and known.session.epoch == session.epoch:
            return known
        self.close()
        try:
            self._registered = RegisteredSession(
                session, self._cache.memory.device, self._pieces.piece_bytes
            )
        except RuntimeError as error:
            self._tier.give_up(str(error))
            _LOG.error("the host tier cannot be used: %s", error)
        return self._registered
