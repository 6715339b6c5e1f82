"""Host rows of a sub-batch on their way to and from the host, on branches beside a sweep.

Waited for (inline, asymmetric), each sub-batch on a branch of its own, its lane's:

    lane 1 |         | rope, depart, ring | wait ...... o |               | rope, depart, ring ...
    lane 0 |                   | rope, depart, ring | wait ......... o |              | rope ...
    main   | QKV 1.i | QKV 0.i | attention 0.i | output 1.i ... QKV 1.i+1 | output 0.i ... QKV 0.i+1

A lane's branch forks behind its own QKV and is joined before its own output projection, while main
is in the other sub-batch. In between nobody else touches the lane's rows of the buffers, and what
follows on the branch comes after what was there: so K and V on their way out, which are the lane's
own, are written again only when its wait for the layer before has ended. A slot of step memory is
written again two sweeps later, behind the wait for what was in it.

Deferred, on two branches:

    leaving  |       | rope, depart 0 | ring 0 |        | rope, depart 1 | ring 1 |
    arriving | wait, o of 0 |                  | wait, o of 1 ............ |      | wait, o of 2
    main     | QKV 0 | attention 0  | output 0 | MLP 0 | QKV 1 | attention 1 | output 1 | MLP 1 ...

What arrives in a layer left for it a sweep ago, so its wait and copy begin as soon as the output
projection before it has read its place, a layer's dense work early. What leaves is waited for only
until its state has changed places with that of the rows that arrive; the doorbell is not.

All of it comes before other kernels' programs: behind those of decode attention it would start when
that ends.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch

from gpu_service.kv.table import blocks_for
from gpu_service.pipeline.cuda.branch import Branch
from gpu_service.pipeline.cuda.inputs import SweepInputs
from gpu_service.pipeline.cuda.rope import RopeStore
from kernels.gpu.host_exchange import Crossing, HostExchange
from kernels.gpu.kv_cache import GpuKvLayout

HOST_ROWS = 16
"""Most host rows of a deferred sweep: one block's worth of K and V."""


@dataclass(frozen=True)
class RowBuffers:
    """The host rows' part of a sweep's buffers."""

    qkv: torch.Tensor
    q: torch.Tensor
    attended: torch.Tensor
    residual: torch.Tensor
    positions: torch.Tensor
    """Not those of deferred rows, which differ from layer to layer."""


class HostRows(Protocol):
    """The launches for each sweep in order: `begin`, per layer `leave`, `ready` and `used`,
    `end`."""

    def begin(self, rows: RowBuffers) -> None:
        """The sweep's inputs are there."""
        ...

    def leave(self, layer: int) -> None:
        """The layer's q, k and v are there."""
        ...

    def ready(self) -> None:
        """What is launched from now on finds the rows that arrive: their o and their state."""
        ...

    def used(self, layer: int) -> None:
        """The layer's output projection has been launched."""
        ...

    def end(self) -> None:
        """What is launched from now on comes after the last doorbell."""
        ...


class _Departures:
    """What leaves: rotated, K and V apart, and copied to step memory."""

    def __init__(
        self,
        exchange: HostExchange,
        layout: GpuKvLayout,
        inputs: SweepInputs,
        rope: RopeStore,
        dtype: torch.dtype,
        rows: int,
    ) -> None:
        """layout: the cache's. rows: the most."""
        self.exchange = exchange
        self.layers = layout.layers
        self.at = inputs.host_bases, inputs.host_counts
        self._rope = rope
        device = inputs.host_bases.device
        blocks = blocks_for(rows, HOST_ROWS)
        self._layout = dataclasses.replace(
            layout, layers=1, blocks=blocks, block_tokens=HOST_ROWS, staging=0
        )
        self._kv = torch.empty(self._layout.shape[1:], dtype=dtype, device=device)
        """K and V of rows that leave."""
        self._slots = torch.arange(HOST_ROWS * blocks, device=device)

    def __call__(
        self,
        layer: int,
        crossing: Crossing,
        rows: RowBuffers,
        positions: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        slots = self._slots[: len(rows.q)]
        self._rope(layer, rows.qkv, positions, slots, rows.q, self._kv, self._layout)
        self.exchange.depart(crossing, rows.q, self._kv, *self.at, residual)


class WaitedRows:
    """`HostRows` of one lane that are back in the layer where they left."""

    def __init__(
        self,
        exchange: HostExchange,
        layout: GpuKvLayout,
        inputs: SweepInputs,
        rope: RopeStore,
        dtype: torch.dtype,
        rows: int,
        lane: int,
    ) -> None:
        """layout: the cache's. rows: the most."""
        self._departures = _Departures(exchange, layout, inputs, rope, dtype, rows)
        self._lane = lane
        self._rows: RowBuffers | None = None
        self._branch = Branch(inputs.host_bases.device, first=True)

    def begin(self, rows: RowBuffers) -> None:
        self._rows = rows

    def leave(self, layer: int) -> None:
        departures, rows = self._departures, self._rows
        assert rows is not None
        exchange = departures.exchange
        crossing = exchange.waited(self._lane, layer)
        with self._branch.forked():
            departures(layer, crossing, rows, rows.positions)
            exchange.ring(crossing, *departures.at)
            # Behind the ring on the same branch: the wait can hold up nothing that it waits for.
            exchange.arrive(crossing, rows.attended, *departures.at)

    def ready(self) -> None:
        self._branch.join()

    def used(self, layer: int) -> None:
        """What arrives next comes after the next layer's QKV."""

    def end(self) -> None:
        """`ready` came after the last doorbell."""


class DeferredRows:
    """`HostRows` that go on by one layer a sweep."""

    def __init__(
        self,
        exchange: HostExchange,
        layout: GpuKvLayout,
        inputs: SweepInputs,
        rope: RopeStore,
        dtype: torch.dtype,
    ) -> None:
        """layout: the cache's."""
        self._departures = _Departures(exchange, layout, inputs, rope, dtype, exchange.rows)
        self._positions = inputs.host_positions
        self._rows: RowBuffers | None = None
        self._left: torch.cuda.Event | None = None
        """Behind it the layer's `residual` is that of the rows that arrive."""
        device = inputs.host_bases.device
        self._leaving = Branch(device, first=True)
        self._arriving = Branch(device, first=True)

    def begin(self, rows: RowBuffers) -> None:
        self._rows = rows
        self._arrive(0, rows)

    def leave(self, layer: int) -> None:
        departures, rows = self._departures, self._rows
        assert rows is not None
        crossing = departures.exchange.deferred(layer)
        with self._leaving.forked():
            departures(layer, crossing, rows, self._positions[layer], rows.residual)
            self._left = self._leaving.mark()
            departures.exchange.ring(crossing, *departures.at)

    def ready(self) -> None:
        self._leaving.reach(self._left)
        self._arriving.join()

    def used(self, layer: int) -> None:
        assert self._rows is not None
        if layer + 1 < self._departures.layers:
            self._arrive(layer + 1, self._rows)

    def end(self) -> None:
        self._leaving.join()

    def _arrive(self, layer: int, rows: RowBuffers) -> None:
        exchange = self._departures.exchange
        with self._arriving.forked():
            exchange.arrive(exchange.deferred(layer), rows.attended, *self._departures.at)
