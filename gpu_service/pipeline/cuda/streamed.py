"""KV of the host tier on its way through staging, on branches beside a sweep.

    branch 0 | gather 0 |          | put 0, gather 2 |                 | put 2, gather 4 | ...
    branch 1            | gather 1 |                 | put 1, gather 3 |
    main                | layer 0 .......| layer 1 ................| layer 2 ...

A layer's gather ends before its K and V are stored, and the one after the next begins when its
attention has read. One gather at a time: two would share the link, and the first be late. Their few
programs are placed before others': behind those of a large chunk's dense layers each gather would
start a layer late, and the next wait for it.
"""

from __future__ import annotations

import torch

from gpu_service.pipeline.cuda.branch import Branch
from gpu_service.pipeline.cuda.inputs import SweepInputs
from kernels.gpu.host_stream import HostStream


class StreamedLayers:
    """The launches, for each sweep in order: `begin`, per layer `ready` and `read`, `end`. Without
    anything to move the kernels end at once, so that graphs need no variant for them."""

    def __init__(
        self, stream: HostStream, memory: torch.Tensor, layers: int, inputs: SweepInputs
    ) -> None:
        """memory: the cache's."""
        self._stream = stream
        self._staging = stream.layout.staged(memory)
        self._layers = layers
        self._inputs = inputs
        self._branches = [Branch(memory.device, first=True) for _ in range(2)]

    def begin(self) -> None:
        """The sweep's inputs are there."""
        for layer in range(min(2, self._layers)):
            with self._branches[layer].forked():
                self._gather(layer)

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
                self._gather(layer + 2)

    def end(self) -> None:
        """What is launched from now on finds the sweep's tokens in the host pool."""
        for branch in self._branches:
            branch.join()

    def _gather(self, layer: int) -> None:
        """Within the layer's branch."""
        given, which = self._inputs, layer % 2
        self._branches[which].follow(self._branches[1 - which])
        self._stream.gather(
            layer, self._staging[which], given.gathered, given.stream_counts, given.stream_pool
        )
