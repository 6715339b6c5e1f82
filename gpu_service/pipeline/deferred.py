"""Mode DEFERRED: one sub-batch and one pass over the weights; host rows go on by one layer a sweep.

    sweep n    GPU | 0: rows + starting  | 1: rows + A  | 2: rows + B  | ...
               CPU | A at layer 1, B at layer 2 ... until sweep n+1 comes to these layers

The rows that wait for the same layer's attention are a cohort. In each sweep a cohort takes its
result, goes through the rest of its layer and the beginning of the next one beside the sub-batch's
own rows, and submits; the host then has until the next sweep. The idea is that of APEX (arXiv
2506.03296, asynchronous overlap) and OmniServe (arXiv 2603.12831, attention piggybacking).

A token takes layers + 1 sweeps. Between two of them all that is left of a row is its state in front
of the layer's end, kept here, and q, k, v in step memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gpu_service.offload.host_tier import HostTierStalled
from gpu_service.pipeline.batch import DeviceBatch
from gpu_service.pipeline.cohorts import Cohort, host_rows, no_tables
from gpu_service.pipeline.device_rows import DeviceRows
from gpu_service.pipeline.model import DenseModel
from gpu_service.pipeline.parts import EngineParts, LaneOutcome
from gpu_service.scheduling.plan import Flight, IterationPlan, Mode


@dataclass(frozen=True)
class _Cohort(Cohort):
    positions: torch.Tensor
    state: torch.Tensor
    """`[rows, hidden]`, of the layer whose attention they wait for."""


class DeferredSweeps:
    """Runs sweeps, and keeps the cohorts between them."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._host = parts.host
        self._nobody = _nobody(parts.model)
        self._waiting = [self._nobody] * parts.geometry.layers
        """Cohorts by the layer whose attention they wait for."""
        self._under_way: dict[Flight, None] = {}
        self._epoch = parts.host.epoch

    def run(self, batch: DeviceBatch, number: int) -> LaneOutcome:
        """One pass; the sub-batch's host rows start with it. `number`: the plan's.

        The outcome's state ends with the rows that have come through all layers."""
        starting = self._starting(batch, number)
        self._under_way.update(dict.fromkeys(starting.flights))
        lost: tuple[Flight, ...] = ()
        if not self._begin(starting):
            lost, starting = self._lose(), self._nobody
        sweep = _Sweep(self._parts, batch, starting, self._waiting, self._nobody)
        state = sweep.run()
        if sweep.stalled:
            lost = self._lose()
        for flight in sweep.finished:
            del self._under_way[flight]
        return LaneOutcome(state, frozenset(sweep.rows.void), sweep.finished, lost)

    def give_up(self, plan: IterationPlan) -> tuple[Flight, ...]:
        """The plan's sweep ended half-way: nothing that was under way will come; returns it."""
        for batch in plan.batches if plan.mode is Mode.DEFERRED else ():
            self._under_way.update(
                (Flight(row.key, plan.number), None) for row in batch.host_decode
            )
        return self._lose()

    def _lose(self) -> tuple[Flight, ...]:
        lost = tuple(self._under_way)
        self._under_way.clear()
        self._waiting[:] = [self._nobody] * len(self._waiting)
        return lost

    def _starting(self, batch: DeviceBatch, number: int) -> _Cohort:
        if batch.host_tables is None:
            return self._nobody
        return _Cohort(
            flights=tuple(Flight(key, number) for key in batch.host_keys),
            positions=batch.positions[batch.host_rows],
            tables=batch.host_tables,
            state=self._nobody.state,
        )

    def _begin(self, starting: _Cohort) -> bool:
        """Tell the host who submits at which layer. False if it is away, or knows nothing of what
        is under way."""
        epoch, self._epoch = self._epoch, self._host.epoch
        if not self._under_way:
            return True
        if self._host.epoch != epoch and any(cohort.flights for cohort in self._waiting):
            return False
        # The cohort that waits for the last layer submits no more.
        submitting = [starting, *self._waiting[:-1]]
        try:
            self._host.begin_sweep([host_rows(submitting, self._parts.geometry.block_tokens)])
        except HostTierStalled:
            return False
        return True


class _Sweep:
    """One pass over the layers."""

    def __init__(
        self,
        parts: EngineParts,
        batch: DeviceBatch,
        starting: _Cohort,
        waiting: list[_Cohort],
        nobody: _Cohort,
    ) -> None:
        self._model = parts.model
        self._host = parts.host
        self._clock = parts.host_wait
        self._batch = batch
        self._beside = starting
        """The cohort that is in the dense layers beside the sub-batch's own rows."""
        self._waiting = waiting
        self._nobody = nobody
        self._own = slice(0, batch.host_rows.start)
        self._submits = any(cohort.flights for cohort in (starting, *waiting[:-1]))
        """The host expects rows in this sweep."""
        self.rows = DeviceRows(parts, batch)
        self.stalled = False
        """The host tier has not answered: what is under way is left out from then on."""
        self.finished: tuple[Flight, ...] = ()

    def run(self) -> torch.Tensor:
        batch, own = self._batch, self._own
        state = self._model.embed(batch.token_ids[: own.stop + len(self._beside.flights)])
        for layer in range(len(self._waiting)):
            beside, arriving = self._beside, self._waiting[layer]
            positions = torch.cat((batch.positions[own], beside.positions))
            q, k, v = self._model.pre_projection(layer, state, positions)
            self._waiting[layer] = replace(beside, state=state[own.stop :].clone())
            self._beside = arriving
            self._submit(layer, q, k, v)
            out = torch.zeros_like(q[own])
            self.rows.attend(layer, q, k, v, out)
            theirs = self._take(layer, q)
            state = torch.cat((state[own], self._beside.state))
            state = self._model.post_projection(layer, state, torch.cat((out, theirs)))
        self.finished = self._beside.flights
        return state

    def _submit(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.stalled or not self._submits:
            return
        rows = slice(self._own.stop, None)
        try:
            self._host.submit(0, layer, q[rows], k[rows], v[rows])
        except HostTierStalled:
            self._stall()

    def _take(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """What the host made of the cohort that was there a sweep ago."""
        theirs = q.new_empty((len(self._beside.flights), *q.shape[1:]))
        if not len(theirs):
            return theirs
        try:
            with self._clock:
                self._host.wait(0, layer, theirs, back=1)
        except HostTierStalled:
            self._stall()
            return q.new_empty((0, *q.shape[1:]))
        return theirs

    def _stall(self) -> None:
        """The sub-batch's own rows go on."""
        self.stalled = True
        self._beside, self._waiting[:] = self._nobody, [self._nobody] * len(self._waiting)


def _nobody(model: DenseModel) -> _Cohort:
    no_ids = torch.empty(0, dtype=torch.int64, device=model.device)
    return _Cohort((), no_tables(), no_ids, model.embed(no_ids))
