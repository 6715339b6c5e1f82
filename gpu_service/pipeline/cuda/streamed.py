"""KV of the host tier on its way through staging, on branches beside a sweep.

    ring     | layer 0 | layer 1 | layer 2 ...
    branch 0 |         unpack 0 |            | put 0,   unpack 2 |                 | put 2, ...
    branch 1 |                    unpack 1   |                   | put 1, unpack 3 |
    main     |                  | layer 0 ...| layer 1 ..........| layer 2 ........| ...

The copy engine brings layers into the ring (`gpu_service.pipeline.cuda.host_ring`), as soon as the
layer that was in its slot has been unpacked. A layer is unpacked before its K and V are stored, and
the one after the next when its attention has read; one after the other, since that is how the ring
is told. Their few programs are placed before others': behind those of a large chunk's dense layers
each would start a layer late.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpu_service.pipeline.cuda.branch import Branch
from gpu_service.pipeline.cuda.host_ring import HostRing
from gpu_service.pipeline.cuda.inputs import SweepInputs
from kernels.gpu.host_stream import RING, HostStream


class StreamedLayers:
    """The launches, for each sweep in order: `begin`, per layer `ready` and `read`, `end`. Without
    anything to move the kernels end at once, so that graphs need no variant for them."""

    def __init__(
        self,
        stream: HostStream,
        ring: HostRing,
        memory: torch.Tensor,
        layers: int,
        inputs: SweepInputs,
    ) -> None:
        """memory: the cache's."""
        self._stream = stream
        self._ring = ring
        self._staging = stream.layout.staged(memory)
        self._layers = layers
        self._inputs = inputs
        self._branches = [Branch(memory.device, first=True) for _ in range(2)]

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Around the launch of a sweep, at once or as a graph, whose inputs were sent before."""
        with self._ring.filled(self._inputs.brought):
            try:
                yield
            except BaseException:
                self.end()  # what the ring is told comes behind all that was launched
                raise

    def begin(self) -> None:
        """The sweep's inputs are there."""
        for layer in range(min(2, self._layers)):
            with self._branches[layer].forked():
                self._unpack(layer)

    def ready(self, layer: int) -> None:
        """What is launched from now on finds the layer's earlier tokens in staging."""
        self._branches[layer % 2].join()

    def read(self, layer: int) -> None:
        """The layer's attention has been launched."""
        given = self._inputs
        with self._branches[layer % 2].forked():
            self._stream.put(
                layer, self._staging[layer % 2], given.put, given.stream_counts, given.stream_pool
            )
            if layer + 2 < self._layers:
                self._unpack(layer + 2)

    def end(self) -> None:
        """What is launched from now on finds the sweep's tokens in the host pool."""
        for branch in self._branches:
            branch.join()

    def _unpack(self, layer: int) -> None:
        """Within the layer's branch."""
        given, ring, which = self._inputs, self._ring, layer % 2
        self._branches[which].follow(self._branches[1 - which])
        ring.bring(layer)
        self._stream.arrive(layer, ring.words, given.stream_counts)
        slot, staging = ring.slots[layer % RING], self._staging[which]
        self._stream.unpack(slot, staging, given.brought_to, given.stream_counts)
