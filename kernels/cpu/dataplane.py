"""Typed face of the data plane: shapes and sizes, the engine's channel, the service's worker.

The memory's layout and the order of events are drawn in `csrc/dataplane.hpp`. Arrays are
C-contiguous numpy arrays or CPU torch tensors, told apart by duck typing; nothing here imports
torch.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import kernels.cpu._neo_cpu as _neo_cpu
from kernels.cpu import DType

_native = _neo_cpu.dataplane

NONCE_BYTES: int = _native.NONCE_BYTES
LANES: int = _native.LANES
LAYER_BOUNDS_SECONDS = tuple(bound / 1e6 for bound in _native.LAYER_BOUNDS_US)
"""Upper bounds of the buckets of `WorkerStats.layers`, which has one more for the rest."""
_ELEMENT_BYTES = {DType.FLOAT32: 4, DType.BFLOAT16: 2, DType.FLOAT16: 2}


class WaitStatus(enum.IntEnum):
    """How a wait ended. FAILED: the worker reported an error or stopped. ABORTED:
    `StepChannel.abort`."""

    OK = 0
    TIMED_OUT = 1
    FAILED = 2
    ABORTED = 3


class WorkerError(enum.IntEnum):
    """What stopped a worker."""

    NONE = 0
    BAD_RECORD = 1
    BAD_SEQUENCE = 2
    INTERNAL = 3


@dataclass(frozen=True)
class StepShape:
    """What fixes the layout of an epoch's control and step memory; equal on both sides."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    activation: DType
    """Of q, k, v and o; never INT8."""
    max_rows: int
    """Rows of one sweep over all lanes."""
    max_blocks_per_row: int

    def native(self) -> Any:
        return _native.StepShape(
            self.layers,
            self.query_heads,
            self.kv_heads,
            self.head_dim,
            self.block_tokens,
            int(self.activation),
            self.max_rows,
            self.max_blocks_per_row,
        )

    def sizes(self) -> tuple[int, int]:
        """Bytes of control memory and of step memory. Raises ValueError on a shape that is out of
        range."""
        control, step = _native.step_sizes(self.native())
        return int(control), int(step)

    def offsets(self) -> tuple[int, ...]:
        """Lane 0's places in bytes: the first layer's `submitted` and `done` in control memory, the
        step from layer to layer; in step memory the size of a slot, of its q, and of its k; and
        `revoked` in control memory."""
        return tuple(int(offset) for offset in _native.step_offsets(self.native()))

    @property
    def query_row_bytes(self) -> int:
        return self.query_heads * self.head_dim * _ELEMENT_BYTES[self.activation]

    @property
    def kv_row_bytes(self) -> int:
        return self.kv_heads * self.head_dim * _ELEMENT_BYTES[self.activation]


Buffer = Any
"""A writable buffer that outlives what is made from it: an mmap, a numpy array, a bytearray."""


class _Pinned:
    """Address and size of a buffer, which cannot be unmapped or resized while this lives."""

    def __init__(self, buffer: Buffer) -> None:
        with memoryview(buffer) as view:
            if view.readonly or not view.contiguous:
                raise ValueError("shared memory must be a writable, contiguous buffer")
            size = view.nbytes
        self._export = (ctypes.c_char * size).from_buffer(buffer)
        self.memory = (ctypes.addressof(self._export), size)


@dataclass(frozen=True)
class StepMemory:
    """Control and step memory of one epoch; keeps both mapped."""

    shape: StepShape
    control: InitVar[Buffer]
    step: InitVar[Buffer]
    addresses: tuple[Any, tuple[int, int], tuple[int, int]] = field(init=False, repr=False)
    _pinned: tuple[_Pinned, _Pinned] = field(init=False, repr=False)

    def __post_init__(self, control: Buffer, step: Buffer) -> None:
        pinned = (_Pinned(control), _Pinned(step))
        object.__setattr__(self, "_pinned", pinned)
        addresses = (self.shape.native(), pinned[0].memory, pinned[1].memory)
        object.__setattr__(self, "addresses", addresses)

    def format(self, epoch: int, nonce: bytes, first_sweep: int = 1) -> None:
        """Service: prepare fresh (zeroed) memory. `first_sweep` moves only in tests of wrapping
        counters."""
        _native.format_control(*self.addresses, epoch, first_sweep, nonce)

    def check(self, epoch: int, nonce: bytes) -> None:
        """Engine: ValueError unless this is the memory that the service announced."""
        _native.check_control(*self.addresses, epoch, nonce)

    def write_engine_nonce(self, nonce: bytes) -> None:
        _native.write_engine_nonce(*self.addresses, nonce)

    def read_engine_nonce(self) -> bytes:
        return bytes(_native.read_engine_nonce(*self.addresses))


def _array(array: Any, byte_count: int, name: str) -> int:
    """Address of a contiguous CPU tensor or numpy array of exactly `byte_count` bytes."""
    if isinstance(array, np.ndarray):
        contiguous, size, address = array.flags.c_contiguous, array.nbytes, array.ctypes.data
    else:
        contiguous, size, address = array.is_contiguous(), array.nbytes, array.data_ptr()
    if not contiguous or size != byte_count:
        raise ValueError(f"{name} must be contiguous and {byte_count} bytes, not {size}")
    return int(address)


Ints = npt.NDArray[np.int32]


class StepChannel:
    """The engine's end. One thread uses it; `abort` may come from any."""

    def __init__(self, memory: StepMemory, blocks: int, spin_us: int = 50) -> None:
        """`blocks`: size of the host pool. `spin_us`: how long a wait spins before it parks on a
        futex."""
        self._memory = memory
        self._shape = memory.shape
        self._native = _native.StepChannel(*memory.addresses, blocks, spin_us)

    @property
    def sweep(self) -> int:
        """Number of the last sweep begun (uint32, wraps)."""
        return int(self._native.sweep)

    @property
    def error(self) -> WorkerError:
        return WorkerError(min(self._native.error, WorkerError.INTERNAL))

    @property
    def progress(self) -> int:
        """Layers that the worker has done in this epoch."""
        return int(self._native.progress)

    def rows(self, lane: int, layer: int, back: int = 0) -> int:
        """Rows of the lane in that layer, in the sweep `back` before the last one begun."""
        return int(self._native.rows(lane, layer, back))

    def begin_sweep(
        self,
        lanes: Sequence[tuple[Ints, Ints]],
        timeout_us: int,
        device_rings: bool = False,
        ranges: Ints | None = None,
    ) -> WaitStatus:
        """Publish the rows of at most two lanes, each `lengths` `[rows]` and `block_tables` `[rows,
        width]`, int32.

        Waits until the worker has left the slots that are used again. Raises ValueError on rows
        that do not fit. `device_rings`: a GPU fills the slots and writes the doorbells; the worker
        does not park during the sweep. `ranges`: `[layers, 2]`, from which row of lane 0 to which
        each layer takes; None means all."""
        packed = []
        for lengths, tables in lanes:
            lengths = np.ascontiguousarray(lengths, np.int32)
            tables = np.ascontiguousarray(tables, np.int32)
            if lengths.ndim != 1 or tables.ndim != 2 or len(tables) != len(lengths):
                raise ValueError("a lane needs lengths [rows] and block_tables [rows, width]")
            packed.append((lengths, tables))
        if ranges is not None:
            ranges = np.ascontiguousarray(ranges, np.int32)
            if ranges.shape != (self._shape.layers, 2):
                raise ValueError(f"ranges must be [{self._shape.layers}, 2]")
        addresses = [
            (
                len(lengths),
                lengths.ctypes.data,
                tables.ctypes.data,
                tables.shape[1],
                0 if ranges is None or lane else ranges.ctypes.data,
            )
            for lane, (lengths, tables) in enumerate(packed)
        ]
        return WaitStatus(self._native.begin_sweep(addresses, timeout_us, device_rings))

    def submit(self, lane: int, layer: int, q: Any, k: Any, v: Any) -> None:
        """Copy `q` `[rows, query_heads, head_dim]`, `k` and `v` `[rows, kv_heads, head_dim]` of the
        layer's rows in and ring. A layer that none of the lane's rows takes part in is submitted,
        too."""
        rows = self.rows(lane, layer)
        kv_bytes = rows * self._shape.kv_row_bytes
        self._native.submit(
            lane,
            layer,
            _array(q, rows * self._shape.query_row_bytes, "q"),
            _array(k, kv_bytes, "k"),
            _array(v, kv_bytes, "v"),
        )

    def wait(self, lane: int, layer: int, out: Any, timeout_us: int, back: int = 0) -> WaitStatus:
        """Fill `out` `[rows, query_heads, head_dim]` with the layer's result in the sweep `back` (0
        or 1) before the last one begun; untouched unless the status is OK."""
        size = self.rows(lane, layer, back) * self._shape.query_row_bytes
        address = _array(out, size, "out")
        return WaitStatus(self._native.wait(lane, layer, address, timeout_us, back))

    def cancel_sweep(self, timeout_us: int) -> WaitStatus:
        """End the current sweep early. After OK the worker touches nothing of it any more."""
        return WaitStatus(self._native.cancel_sweep(timeout_us))

    def revoke(self) -> None:
        """Give the epoch up: the worker is told to stop. When it has is another matter: see
        gpu_service.offload."""
        self._native.revoke()

    def abort(self) -> None:
        """Make the current and every later wait return ABORTED at once."""
        self._native.abort()


@dataclass(frozen=True)
class WorkerOptions:
    """How one worker computes."""

    kv_dtype: DType
    blocks: int
    scale: float
    softcap: float = 0.0
    """0 means off."""
    windows: tuple[int, ...] = ()
    """Per layer, in tokens, 0 for the whole context; empty means that everywhere."""
    threads: int = 1
    cpus: tuple[int, ...] = ()
    """Where to pin the threads, the worker's own first; empty means not pinned."""
    spin_us: int = 50
    """How long it spins for a doorbell before it parks."""


@dataclass(frozen=True)
class WorkerStats:
    """Counters since the worker's start; `backlog` is of now."""

    sweeps: int
    rows: int
    """Rows times layers."""
    kv_bytes_read: int
    busy_seconds: float
    waits: int
    """For a doorbell, in the middle of a sweep."""
    wait_seconds: float
    parks: int
    """How often the worker went to sleep for want of work."""
    backlog: int
    """Layers that have been rung for and are not done."""
    layer_seconds: float
    """From when a layer was taken up until it was done, of all layers; those that are taken up
    together overlap."""
    layers: tuple[int, ...]
    """Attended with rows, by their time; see `LAYER_BOUNDS_SECONDS`."""


class Worker:
    """The service's end: a C++ thread, which never needs the interpreter. The creator calls
    `stop`."""

    def __init__(self, memory: StepMemory, pool: Buffer, options: WorkerOptions) -> None:
        self._keep = (memory, _Pinned(pool))
        self._native = _native.Worker(
            *memory.addresses,
            self._keep[1].memory,
            int(options.kv_dtype),
            options.blocks,
            options.scale,
            options.softcap,
            list(options.windows),
            options.threads,
            list(options.cpus),
            options.spin_us,
        )

    @property
    def running(self) -> bool:
        return bool(self._native.running)

    def start(self) -> None:
        self._native.start()

    def stop(self) -> None:
        """Returns once the thread has ended: nothing of the session's memory is touched from then
        on. Idempotent."""
        self._native.stop()

    def stats(self) -> WorkerStats:
        sweeps, rows, kv_bytes, busy_ns, waits, wait_us, parks, backlog, layer_ns, layers = (
            self._native.stats()
        )
        return WorkerStats(
            sweeps, rows, kv_bytes, busy_ns / 1e9, waits, wait_us / 1e6, parks, backlog,
            layer_ns / 1e9, tuple(layers),
        )  # fmt: skip
