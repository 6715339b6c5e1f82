"""The host pool's blocks on their way to the device, two layers of them in the host's layout.

    copies | layer 0 | layer 1 | wait for "0 is unpacked" | layer 2 | wait for "1 ..." | layer 3 ...
    sweep  | wait for "0 is there" | unpack 0 | wait for "1 ..." | unpack 1 | ...

Both wait for words of device memory, since a captured sweep can neither contain copies whose number
changes nor wait for another stream's. Whatever has been queued can end, unless the host's thread
has only to queue more copies: those of a graph come right behind it, and hold the thread up if
there is no room for them, not the sweep; launched one by one, kernels come behind the copies that
they wait for, since a launch may wait for the device (a full queue, a kernel that is loaded).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_service.pipeline.cuda.copy_engine import CopyEngine
from kernels.gpu.host_stream import RING, HostStream

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Brought:
    """What a sweep reads of the host pool."""

    host: Longs
    """Its blocks, `[blocks]`,"""
    staged: Longs
    """and the blocks of a slot, and of staging, in which they arrive."""
    address: int
    """Of the pool."""
    layer_bytes: int
    """From one layer of the pool to the next."""
    number: int
    """Layer l is `number + l` in the ring's words."""


class HostRing:
    """Used by the engine core's thread."""

    def __init__(
        self, stream: HostStream, layers: int, device: torch.device, engine: CopyEngine | None
    ) -> None:
        """engine: None where memory is the host's."""
        self._layers = layers
        self._piece_bytes = stream.piece_bytes
        shape = RING, stream.layout.staging, stream.piece_bytes
        self.slots = torch.zeros(shape, dtype=torch.uint8, device=device)
        """uint8 `[RING, blocks, piece_bytes]`: layer l comes to slot l % RING."""
        self.words = torch.zeros(2, dtype=torch.int32, device=device)
        """int32 `[2]`: as `HostStream.arrive` wants them."""
        self._sources = self._targets = np.empty((layers, 0), np.uint64)
        self._number = self._sent = 0
        self._engine = engine

    @contextmanager
    def filled(self, brought: Brought | None) -> Iterator[None]:
        """A sweep that waits for `brought` is launched within. The copies begin when what was
        launched before has ended."""
        self._plan(brought)
        if brought is None:
            yield
            return
        if self._engine is not None:
            self._engine.follow()
        try:
            yield
        finally:
            self.bring(self._layers - 1)
            if self._engine is not None:
                # Also if not all of the sweep could be launched: nothing waits for ever.
                unpacked = brought.number + self._layers
                self._engine.set_behind_sweep(self.words[1:], unpacked)

    def bring(self, layer: int) -> None:
        """The copies of layers up to this one. Called in front of the layer's `arrive`, and for all
        that is left when the sweep has been launched."""
        if not self._sources.size:
            return
        for index in range(self._sent, layer + 1):
            if self._engine is None:
                self._copy_now(index)
            else:
                self._queue(self._engine, index)
        self._sent = max(self._sent, layer + 1)

    def _plan(self, brought: Brought | None) -> None:
        """Where each piece comes from and goes, by layer."""
        self._sent = 0
        if brought is None:
            self._sources = self._targets = self._sources[:, :0]
            return
        self._number = brought.number
        layer = np.arange(self._layers)[:, None]
        pool, slots = brought.address, self.slots
        sources = pool + layer * brought.layer_bytes + brought.host * self._piece_bytes
        targets = slots.data_ptr() + layer % RING * slots[0].nbytes
        self._sources = sources.astype(np.uint64)
        self._targets = (targets + brought.staged * self._piece_bytes).astype(np.uint64)

    def _queue(self, engine: CopyEngine, layer: int) -> None:
        brought, unpacked = self.words[:1], self.words[1:]
        if layer >= RING:
            engine.wait(unpacked, self._number + layer - RING + 1)
        engine.copy(self._targets[layer], self._sources[layer], self._piece_bytes)
        engine.set(brought, self._number + layer + 1)

    def _copy_now(self, layer: int) -> None:
        """Where there is no copy engine."""
        for target, source in zip(self._targets[layer], self._sources[layer], strict=True):
            ctypes.memmove(int(target), int(source), self._piece_bytes)
        self.words[0] = (self._number + layer + 1 + (1 << 31)) % (1 << 32) - (1 << 31)
