"""A data plane within one process: a worker and a channel on the same anonymous memory, and a
reference pool with the same contents for the in-process kernel."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kernels.cpu import DType, KvLayout, KvPool, ThreadPool, decode_attention
from kernels.cpu.dataplane import (
    StepChannel,
    StepMemory,
    StepShape,
    WaitStatus,
    Worker,
    WorkerOptions,
)

SHAPE = StepShape(
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_dim=32,
    block_tokens=16,
    activation=DType.FLOAT32,
    max_rows=6,
    max_blocks_per_row=4,
)
BLOCKS = 24
SCALE = 0.25
SECOND_US = 1_000_000

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def anonymous(size: int) -> mmap.mmap:
    return mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)


@dataclass
class Rig:
    """See the module. `control` may be scribbled on."""

    shape: StepShape
    control: mmap.mmap
    step: mmap.mmap
    pool_memory: mmap.mmap
    memory: StepMemory
    worker: Worker
    channel: StepChannel
    pool: KvPool
    reference: KvPool
    options: WorkerOptions
    threads: ThreadPool
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def normal(self, *shape: int) -> Floats:
        return self.random.standard_normal(shape, dtype=np.float32)

    def fill(self) -> None:
        """The same random K and V in both pools."""
        slots = np.arange(BLOCKS * self.shape.block_tokens, dtype=np.int64)
        for layer in range(self.shape.layers):
            k = self.normal(len(slots), self.shape.kv_heads, self.shape.head_dim)
            v = self.normal(len(slots), self.shape.kv_heads, self.shape.head_dim)
            self.pool.write(layer, slots, k, v)
            self.reference.write(layer, slots, k, v)

    def rows(self, lengths: list[int]) -> tuple[Ints, Ints]:
        """Lengths and block tables of rows that share no block."""
        width = self.shape.max_blocks_per_row
        tables = self.random.permutation(BLOCKS)[: len(lengths) * width].astype(np.int32)
        return np.array(lengths, np.int32), tables.reshape(len(lengths), width)

    def inputs(self, rows: int) -> tuple[Floats, Floats, Floats]:
        shape = self.shape
        return (
            self.normal(rows, shape.query_heads, shape.head_dim),
            self.normal(rows, shape.kv_heads, shape.head_dim),
            self.normal(rows, shape.kv_heads, shape.head_dim),
        )

    def expected(
        self, layer: int, lane: tuple[Ints, Ints], inputs: tuple[Floats, Floats, Floats]
    ) -> Floats:
        out = np.empty_like(inputs[0])
        lengths, tables = lane
        window = self.options.windows[layer] if self.options.windows else 0
        decode_attention(
            self.threads,
            self.reference,
            layer,
            *inputs,
            tables,
            lengths,
            out,
            scale=self.options.scale,
            window=window,
        )
        return out

    def sweep(self, *lanes: tuple[Ints, Ints]) -> list[tuple[Floats, Floats]]:
        """One whole sweep; per layer and lane what came back and what the kernel says."""
        assert self.channel.begin_sweep(lanes, SECOND_US) is WaitStatus.OK
        pairs = []
        for layer in range(self.shape.layers):
            inputs = [self.inputs(len(lengths)) for lengths, _ in lanes]
            for index, arrays in enumerate(inputs):
                self.channel.submit(index, layer, *arrays)
            for index, arrays in enumerate(inputs):
                out = np.full_like(arrays[0], np.nan)
                status = self.channel.wait(index, layer, out, SECOND_US)
                assert status is WaitStatus.OK, (status, self.channel.error)
                pairs.append((out, self.expected(layer, lanes[index], arrays)))
        return pairs

    def stopped_by_itself(self) -> bool:
        """Whether the worker's thread ends without being told to."""
        deadline = time.monotonic() + 5
        while self.worker.running and time.monotonic() < deadline:
            time.sleep(0.001)
        return not self.worker.running

    def restart(self, first_sweep: int = 1, start: bool = True) -> None:
        """Fresh control memory, worker and channel, on the same pool."""
        self.worker.stop()
        self.control[:] = bytes(len(self.control))
        self.memory.format(1, bytes(16), first_sweep)
        self.worker = Worker(self.memory, self.pool_memory, self.options)
        if start:
            self.worker.start()
        self.channel = StepChannel(self.memory, BLOCKS)


@contextmanager
def rig(first_sweep: int = 1, shape: StepShape = SHAPE, **options: object) -> Iterator[Rig]:
    control_bytes, step_bytes = shape.sizes()
    control, step = anonymous(control_bytes), anonymous(step_bytes)
    memory = StepMemory(shape, control, step)
    memory.format(1, bytes(16), first_sweep)
    layout = KvLayout(
        shape.layers, shape.kv_heads, shape.head_dim, shape.block_tokens, DType.FLOAT32
    )
    # One page more than needed, to see whether somebody writes past the end.
    pool_memory = anonymous(layout.pool_bytes(BLOCKS) + mmap.PAGESIZE)
    reference = anonymous(layout.pool_bytes(BLOCKS))
    worker_options = replace(
        WorkerOptions(kv_dtype=DType.FLOAT32, blocks=BLOCKS, scale=SCALE),
        **options,  # type: ignore[arg-type]
    )
    worker = Worker(memory, pool_memory, worker_options)
    with ThreadPool(1) as threads:
        made = Rig(
            shape=shape,
            control=control,
            step=step,
            pool_memory=pool_memory,
            memory=memory,
            worker=worker,
            channel=StepChannel(memory, BLOCKS),
            pool=KvPool(layout, BLOCKS, memoryview(pool_memory)),
            reference=KvPool(layout, BLOCKS, memoryview(reference)),
            options=worker_options,
            threads=threads,
        )
        made.fill()
        worker.start()
        try:
            yield made
        finally:
            made.worker.stop()
