"""Host rows (deferred mode) on their way to and from the host, on branches beside a sweep.

    leaving  |       | rope, depart 0 | ring 0 |        | rope, depart 1 | ring 1 |
    arriving | wait, o of 0 |                  | wait, o of 1 ............ |      | wait, o of 2
    main     | QKV 0 | attention 0  | output 0 | MLP 0 | QKV 1 | attention 1 | output 1 | MLP 1 ...

What arrives in a layer left for it a sweep ago, so its wait and copy begin as soon as the output
projection before it has read its place, a layer's dense work early. What leaves is waited for only
until its state has changed places with that of the rows that arrive; the doorbell is not. Both come
before other kernels' programs: behind those of decode attention they would start when that ends.
"""

from __future__ import annotations

import dataclasses

import torch

from gpu_service.pipeline.cuda.branch import Branch
from gpu_service.pipeline.cuda.inputs import SweepInputs
from kernels.gpu.host_exchange import HostExchange
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.rope_store import rope_store

HOST_ROWS = 16
"""Most host rows of a sweep: one block's worth of K and V."""


class HostRows:
    """The launches, for each sweep in order: `begin`, per layer `leave`, `ready` and `used`,
    `end`. All take the buffers' host rows."""

    def __init__(
        self,
        exchange: HostExchange,
        layout: GpuKvLayout,
        inputs: SweepInputs,
        cos_sin: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        """layout: the cache's."""
        self._exchange = exchange
        self._inputs = inputs
        self._cos_sin = cos_sin
        self._layers = layout.layers
        device = inputs.host_bases.device
        self._layout = dataclasses.replace(
            layout, layers=1, blocks=1, block_tokens=HOST_ROWS, staging=0
        )
        self._kv = torch.empty(
            1, 2, layout.kv_heads, HOST_ROWS, layout.head_dim, dtype=dtype, device=device
        )
        """K and V of rows that leave."""
        self._slots = torch.arange(HOST_ROWS, device=device)
        self._leaving = Branch(device, first=True)
        self._arriving = Branch(device, first=True)

    def begin(self, attended: torch.Tensor) -> None:
        """The sweep's inputs are there."""
        self._arrive(0, attended)

    def leave(
        self,
        layer: int,
        qkv: torch.Tensor,
        q: torch.Tensor,
        residual: torch.Tensor,
        qk_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.cuda.Event | None:
        """The layer's q, k and v are there. Returns the mark behind which `residual` is that of the
        rows that arrive."""
        given, exchange = self._inputs, self._exchange
        at = (given.host_bases, given.host_counts)
        with self._leaving.forked():
            rope_store(
                qkv,
                self._cos_sin,
                given.host_positions[layer],
                self._slots[: len(q)],
                q,
                self._kv,
                self._layout,
                qk_norm=qk_norm,
                eps=eps,
            )
            exchange.depart(layer, q, self._kv, residual, *at)
            left = self._leaving.mark()
            exchange.ring(layer, *at)
        return left

    def ready(self, left: torch.cuda.Event | None) -> None:
        """What is launched from now on finds the rows that arrive: their o and their state."""
        self._leaving.reach(left)
        self._arriving.join()

    def used(self, layer: int, attended: torch.Tensor) -> None:
        """The layer's output projection has been launched."""
        if layer + 1 < self._layers:
            self._arrive(layer + 1, attended)

    def end(self) -> None:
        """What is launched from now on comes after the last doorbell."""
        self._leaving.join()

    def _arrive(self, layer: int, attended: torch.Tensor) -> None:
        given = self._inputs
        with self._arriving.forked():
            self._exchange.arrive(layer, attended, given.host_bases, given.host_counts)
