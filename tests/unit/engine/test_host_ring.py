"""The order in which a sweep's copies are queued: whatever has been queued can end by itself."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from gpu_service.pipeline.cuda.host_ring import Brought, HostRing
from kernels.gpu.host_stream import RING, HostStream
from kernels.gpu.kv_cache import GpuKvLayout

LAYERS, STAGING, LAYER_BYTES, NUMBER = 4, 3, 1 << 20, 2**31 - 2
BROUGHT = Brought(np.array([7, 2]), np.array([0, 2]), 1 << 40, LAYER_BYTES, NUMBER)


class Engine:
    """Notes what is queued, kernels of the sweep as well."""

    def __init__(self) -> None:
        self.queued: list[Any] = []

    def follow(self) -> None:
        self.queued.append("follow")

    def copy(self, targets: Any, sources: Any, size: int) -> None:
        self.queued.append(("copy", targets.tolist(), sources.tolist(), size))

    def wait(self, word: torch.Tensor, number: int) -> None:
        self.queued.append(("wait", word.data_ptr(), number))

    def set(self, word: torch.Tensor, number: int) -> None:
        self.queued.append(("set", word.data_ptr(), number))

    def set_behind_sweep(self, word: torch.Tensor, number: int) -> None:
        self.queued.append(("set behind", word.data_ptr(), number))


def ring() -> tuple[HostRing, Engine]:
    stream = HostStream(GpuKvLayout(LAYERS, 2, 1, 16, 16, staging=STAGING), torch.bfloat16)
    engine: Any = Engine()
    return HostRing(stream, LAYERS, torch.device("cpu"), engine), engine


def copies(made: HostRing) -> list[list[Any]]:
    """What is to be queued for each layer."""
    brought, unpacked = made.words.data_ptr(), made.words.data_ptr() + 4
    found = []
    for layer in range(LAYERS):
        piece, slot = made.slots.shape[2], made.slots[layer % RING]
        sources = [BROUGHT.address + layer * LAYER_BYTES + block * piece for block in (7, 2)]
        targets = [slot[block].data_ptr() for block in (0, 2)]
        wait = [("wait", unpacked, NUMBER + layer - RING + 1)] if layer >= RING else []
        copy = ("copy", targets, sources, piece)
        found.append([*wait, copy, ("set", brought, NUMBER + layer + 1)])
    return found


def test_copies_of_a_graph_come_behind_it() -> None:
    made, engine = ring()
    with made.filled(BROUGHT):
        engine.queued.append("graph")
    end = ("set behind", made.words[1:].data_ptr(), NUMBER + LAYERS)
    assert engine.queued == ["follow", "graph", *chain(*copies(made)), end]


def test_single_launches_come_behind_the_copies_that_they_wait_for() -> None:
    made, engine = ring()
    with made.filled(BROUGHT):
        for layer in range(LAYERS):
            made.bring(layer)
            engine.queued.append(layer)
    expected: list[Any] = ["follow"]
    for layer, queued in enumerate(copies(made)):
        expected += [*queued, layer]
    end = ("set behind", made.words[1:].data_ptr(), NUMBER + LAYERS)
    assert engine.queued == [*expected, end]


def test_copies_of_a_sweep_that_was_launched_in_part_end_all_the_same() -> None:
    made, engine = ring()

    def launch() -> None:
        with made.filled(BROUGHT):
            made.bring(0)
            engine.queued.append(0)
            raise MemoryError

    with pytest.raises(MemoryError):
        launch()
    first, *others = copies(made)
    end = ("set behind", made.words[1:].data_ptr(), NUMBER + LAYERS)
    assert engine.queued == ["follow", *first, 0, *chain(*others), end]


def test_a_sweep_without_anything_to_bring_queues_nothing() -> None:
    made, engine = ring()
    with made.filled(BROUGHT):
        pass
    engine.queued.clear()
    with made.filled(None):
        made.bring(0)
    assert engine.queued == []
