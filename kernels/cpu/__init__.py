"""Decode attention on the CPU over a block-paged KV pool: the typed face of the extension.

Arrays are C-contiguous numpy arrays or CPU torch tensors; torch is never imported. The GIL is
released while the extension works. Wrong arguments raise ValueError with a sentence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import kernels.cpu._neo_cpu as _neo_cpu
from kernels.cpu.arrays import DType, activation_dtype, address
from kernels.cpu.placement import allowed_threads, default_cpus, default_threads

__all__ = [
    "LAYOUT_VERSION",
    "DType",
    "KvLayout",
    "KvPool",
    "ThreadPool",
    "allowed_threads",
    "decode_attention",
    "default_cpus",
    "default_threads",
    "first_touch",
    "isa",
    "isas",
    "read_all",
]

LAYOUT_VERSION: int = _neo_cpu.LAYOUT_VERSION

_TOUCH_STEP_BYTES = 256 << 20


def isa() -> str:
    """The instruction set that new thread pools use: the best there is, or what NEO_CPU_ISA names.

    Raises ValueError when this machine lacks what NEO_CPU_ISA names.
    """
    return str(_neo_cpu.isa())


def isas() -> tuple[str, ...]:
    """The instruction sets that this build and this machine have, worst first."""
    return tuple(_neo_cpu.isas())


def loop_isa(kv: DType, activation: DType, group: int) -> str:
    """The instruction set that new thread pools use for these types and `group` query heads a KV
    head: not `isa()` where a lesser one is faster, or has the only loop."""
    return str(_neo_cpu.loop_isa(int(kv), int(activation), group))


def first_touch(
    place: int,
    size_bytes: int,
    threads: ThreadPool,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Commit `size_bytes` of memory at address `place`, in huge pages where there are any.

    What is there already stays. progress: called with (bytes done, bytes in all) now and then.
    """
    if size_bytes <= 0 or place <= 0:
        raise ValueError("first_touch needs an address and a positive size")
    _neo_cpu.want_huge_pages(place, size_bytes)
    for done in range(0, size_bytes, _TOUCH_STEP_BYTES):
        step = min(_TOUCH_STEP_BYTES, size_bytes - done)
        _neo_cpu.touch(threads.native, place + done, step)
        if progress is not None:
            progress(done + step, size_bytes)


def read_all(place: int, size_bytes: int, threads: ThreadPool) -> int:
    """Read all of the memory at address `place` and return the sum of its 64-bit words: what a
    benchmark compares with."""
    return int(_neo_cpu.read_all(threads.native, place, size_bytes))


def read_regions(place: int, layout: KvLayout, blocks: Any, threads: ThreadPool) -> int:
    """Like `read_all`, but of a pool's blocks in the order and the units that the attention reads
    them in. blocks: `[count]` int32, ids within the memory at `place`."""
    return int(
        _neo_cpu.read_regions(
            threads.native,
            place,
            layout.piece_bytes // layout.kv_heads,
            layout.kv_heads,
            address("blocks", blocks, (len(blocks),), "int32"),
            len(blocks),
        )
    )


@dataclass(frozen=True)
class KvLayout:
    """What fixes the bytes of a piece: the K and V of one block of one layer, contiguous."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: DType

    @property
    def piece_bytes(self) -> int:
        return int(_neo_cpu.piece_bytes(*self.native()))

    def pool_bytes(self, blocks: int) -> int:
        return self.layers * blocks * self.piece_bytes

    def native(self) -> tuple[int, int, int, int, int]:
        return self.layers, self.kv_heads, self.head_dim, self.block_tokens, int(self.dtype)


class ThreadPool:
    """Threads for one parallel region at a time; the calling thread is one of them.

    cpus: where to pin the others; spin_us: how long an idle one spins before it parks.
    """

    def __init__(self, threads: int, cpus: tuple[int, ...] = (), spin_us: int = 50) -> None:
        if spin_us < 0:
            raise ValueError("spin_us must not be negative")
        self.size = threads
        self.native: Any = _neo_cpu.ThreadPool(threads, list(cpus), spin_us)

    def close(self) -> None:
        """Joins the threads. The pool cannot be used afterwards."""
        self.native = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class KvPool:
    """A view of `blocks` KV blocks in memory that the caller owns; keeps a reference to it.

    memory: a writable buffer aligned to 64 bytes, or (address, bytes).
    """

    def __init__(self, layout: KvLayout, blocks: int, memory: Any) -> None:
        self.layout = layout
        self.blocks = blocks
        self._memory = memory
        if isinstance(memory, tuple):
            place, size = memory
        else:
            view = memoryview(memory)
            place = ctypes.addressof(ctypes.c_char.from_buffer(view))
            size = view.nbytes
        self.memory = (place, size)
        """Address and bytes."""
        self.native: Any = _neo_cpu.KvPool(*layout.native(), blocks, place, size)

    def write(
        self, layer: int, slots: Any, k: Any, v: Any, threads: ThreadPool | None = None
    ) -> None:
        """Store `k`, `v` `[tokens, kv_heads, head_dim]` at `slots` `[tokens]` int64, converted or
        quantised to the pool's dtype."""
        self._move(self.native.write, layer, slots, k, v, threads)

    def read(
        self, layer: int, slots: Any, k_out: Any, v_out: Any, threads: ThreadPool | None = None
    ) -> None:
        """Fill `k_out`, `v_out` `[tokens, kv_heads, head_dim]` from `slots`, dequantised."""
        self._move(self.native.read, layer, slots, k_out, v_out, threads)

    def copy_from(
        self, source: KvPool, source_blocks: Any, blocks: Any, threads: ThreadPool | None = None
    ) -> None:
        """Copy whole blocks, all layers; both id arrays `[count]` int64, layouts equal."""
        if source.layout != self.layout:
            raise ValueError("pools of different layouts cannot exchange blocks")
        count = len(blocks)
        self.native.copy_blocks(
            source.native,
            address("source_blocks", source_blocks, (count,), "int64"),
            address("blocks", blocks, (count,), "int64"),
            count,
            threads and threads.native,
        )

    def _move(
        self, call: Any, layer: int, slots: Any, k: Any, v: Any, threads: ThreadPool | None
    ) -> None:
        tokens = len(slots)
        shape = (tokens, self.layout.kv_heads, self.layout.head_dim)
        activation = activation_dtype("k", k)
        if activation_dtype("v", v) != activation:
            raise ValueError("k and v must have the same dtype")
        call(
            layer,
            address("slots", slots, (tokens,), "int64"),
            tokens,
            address("k", k, shape),
            address("v", v, shape),
            int(activation),
            threads and threads.native,
        )


def decode_attention(
    threads: ThreadPool,
    pool: KvPool,
    layer: int,
    q: Any,
    k_new: Any | None,
    v_new: Any | None,
    block_tables: Any,
    lengths: Any,
    out: Any,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    lse: Any | None = None,
) -> None:
    """One layer's decode attention; fills `out` `[rows, query_heads, head_dim]`.

    q: like `out`. k_new, v_new: `[rows, kv_heads, head_dim]`, appended at position length - 1
    first; None when the pool has them already. block_tables: `[rows, width]` int32 block ids.
    lengths: `[rows]` int32 tokens attended, the new one included. window: tokens that a query sees,
    itself included; 0 means all. softcap: scores become cap * tanh(score / cap); 0 means off.
    lse: `[rows, query_heads]` float32, filled with the log-sum-exp of the scores.
    """
    layout = pool.layout
    if len(q.shape) != 3 or len(block_tables.shape) != 2:
        raise ValueError("q must be [rows, query_heads, head_dim] and block_tables [rows, width]")
    rows, query_heads, _ = q.shape
    activation = activation_dtype("q", q)
    for name, array in (("k_new", k_new), ("v_new", v_new), ("out", out)):
        if array is not None and activation_dtype(name, array) != activation:
            raise ValueError(f"{name} and q must have the same dtype")
    if (k_new is None) != (v_new is None):
        raise ValueError("k_new and v_new come together")
    head, kv = (rows, query_heads, layout.head_dim), (rows, layout.kv_heads, layout.head_dim)
    width = block_tables.shape[1]
    pool.native.attend(
        threads.native,
        layer,
        rows,
        query_heads,
        int(activation),
        address("q", q, head),
        0 if k_new is None else address("k_new", k_new, kv),
        0 if v_new is None else address("v_new", v_new, kv),
        address("block_tables", block_tables, (rows, width), "int32"),
        width,
        address("lengths", lengths, (rows,), "int32"),
        address("out", out, head),
        0 if lse is None else address("lse", lse, (rows, query_heads), "float32"),
        scale,
        window,
        softcap,
    )
