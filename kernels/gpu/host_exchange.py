"""Host attention's side of the device: rows leave for a cpu_service in the middle of a sweep, and
those that have left come back, without a host thread in between.

    depart   q, k, v of the host rows -> step memory (docs/protocol.md, "Shared memory"); deferred:
             their state <-> the state of those that arrive
    ring     the layer's doorbell
    arrive   wait until the host is done; o in step memory -> the rows' place in attention's output

A `Crossing` says who crosses over where. Deferred rows are due a sweep after they have left, so
that `arrive` need not come after the layer's own `depart` and `ring`: a sweep launches it as soon
as that place is free. Rows that are waited for in the same sweep arrive behind their ring.

Control and step memory is the host's, registered with CUDA; its addresses are read from device
memory, since a CUDA graph outlives an epoch. A wait ends by the device's clock, or when the engine
has given the epoch up, since its peer is gone: the status word is then set, and no later wait of
the sweep waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.tensors import FLOATS, check
from kernels.gpu.words import INTERPRETED, load_acquire, nanoseconds, store_release

LANES = 2
"""Queues of layers within a sweep, as in kernels/cpu/csrc/dataplane.hpp."""
_CHUNK = 2048
_POLLS = 16
"""Looks at the counter between two at the word that ends the wait, and at the clock."""
_MOST_POLLS = 200_000
"""In the interpreter, which has no device clock."""


@dataclass(frozen=True)
class StepOffsets:
    """Where one lane's parts are in control and step memory, in bytes."""

    submitted: int
    """Of layer 0's counter in control memory."""
    done: int
    bell_stride: int
    """From one layer's counters to the next one's."""
    slot: int
    """Size of a slot; a layer has two, for even and odd sweeps."""
    q: int
    """Size of q in a slot, and of o."""
    kv: int
    """Size of k, and of v."""
    revoked: int
    """Of the word in control memory that says that the engine has given the epoch up."""


@dataclass(frozen=True)
class Crossing:
    """Which rows leave for the host and come back in one layer of a sweep."""

    place: int
    """Of the lane's doorbell and slots for the layer: those of all layers of lane 0, then lane
    1's."""
    leaving: int
    """Where in `counts` is how many leave,"""
    arriving: int
    """and how many arrive."""
    back: int
    """Sweeps since those that arrive have left."""


@triton.jit(do_not_specialize=["place", "leaving"])
def _depart_kernel(
    q_ptr,  # [rows, Q_WIDTH]
    kv_ptr,  # [rows / 16][K | V][KV_WIDTH / DIM][16][DIM], as a block of the cache
    residual_ptr,  # [rows, HIDDEN]
    parked_ptr,  # the same, of the rows that wait for this layer
    bases_ptr,  # int64 [2]
    counts_ptr,  # int32 [layers + 2]; the last one is the sweep's number
    place, leaving, sweep_at, slot_bytes, q_bytes, kv_bytes,
    Q_WIDTH: tl.constexpr, KV_WIDTH: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr,
    COPY_PARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, CHUNK)
    if part >= COPY_PARTS:
        element = (part - COPY_PARTS) * CHUNK + at
        ok = element < HIDDEN
        here, there = residual_ptr + row * HIDDEN + element, parked_ptr + row * HIDDEN + element
        going, coming = tl.load(here, mask=ok), tl.load(there, mask=ok)
        tl.store(here, coming, mask=ok)
        tl.store(there, going, mask=ok)
        return
    if row >= tl.load(counts_ptr + leaving):
        return
    element = part * CHUNK + at
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    size: tl.constexpr = dtype.primitive_bitwidth // 8
    slot = place * 2 + (tl.load(counts_ptr + sweep_at) & 1)
    base = tl.load(bases_ptr + 1) + slot.to(tl.int64) * slot_bytes
    is_query = element < Q_WIDTH
    other = element - Q_WIDTH
    x = tl.load(q_ptr + row * Q_WIDTH + element, mask=is_query, other=0.0)
    head = row // 16 * (2 * KV_WIDTH // DIM) + other // DIM
    source = (head * 16 + row % 16) * DIM + other % DIM
    y = tl.load(kv_ptr + source, mask=(other >= 0) & (other < 2 * KV_WIDTH), other=0.0)
    target = base.to(tl.pointer_type(dtype))
    tl.store(target + row * Q_WIDTH + element, x, mask=is_query)
    is_key = (other >= 0) & (other < KV_WIDTH)
    tl.store(target + q_bytes // size + row * KV_WIDTH + other, y, mask=is_key)
    is_value = (other >= KV_WIDTH) & (other < 2 * KV_WIDTH)
    value = (q_bytes + kv_bytes) // size + row * KV_WIDTH + other - KV_WIDTH
    tl.store(target + value, y, mask=is_value)


@triton.jit(do_not_specialize=["place"])
def _ring_kernel(bases_ptr, counts_ptr, place, sweep_at, submitted, bell_stride):
    bell = tl.load(bases_ptr) + place.to(tl.int64) * bell_stride + submitted
    store_release(bell, tl.load(counts_ptr + sweep_at))


@triton.jit(do_not_specialize=["place", "count"])
def _wait_kernel(
    bases_ptr, counts_ptr, status_ptr, place, count, sweep_at, done, bell_stride, revoked,
    deadline_ns, BACK: tl.constexpr, POLLS: tl.constexpr, MOST_POLLS: tl.constexpr,
):  # fmt: skip
    control = tl.load(bases_ptr) + place.to(tl.int64) * bell_stride
    left = tl.load(counts_ptr + sweep_at) - BACK
    arriving = tl.load(counts_ptr + count)
    failed = tl.load(status_ptr)
    if (arriving > 0) & (failed == 0):
        ahead = load_acquire(control + done) - left
        start = nanoseconds()
        over, polls = 0, 0
        while (ahead < 0) & (over == 0):
            polls += 1
            if polls % POLLS == 0:
                given_up = load_acquire(tl.load(bases_ptr) + revoked) != 0
                late = nanoseconds() - start > deadline_ns
                over = (given_up | late | (INTERPRETED and polls > MOST_POLLS)).to(tl.int32)
            ahead = load_acquire(control + done) - left
        if ahead < 0:
            tl.store(status_ptr, 1)


@triton.jit(do_not_specialize=["place", "count"])
def _arrive_kernel(
    out_ptr,  # [rows, Q_WIDTH]
    bases_ptr, counts_ptr, status_ptr, place, count, sweep_at, slot_bytes, o_offset,
    BACK: tl.constexpr, Q_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    if (row >= tl.load(counts_ptr + count)) | (tl.load(status_ptr) != 0):
        return
    slot = place * 2 + ((tl.load(counts_ptr + sweep_at) - BACK) & 1)
    base = tl.load(bases_ptr + 1) + slot.to(tl.int64) * slot_bytes + o_offset
    ok = at < Q_WIDTH
    source = base.to(tl.pointer_type(out_ptr.dtype.element_ty)) + row * Q_WIDTH + at
    tl.store(out_ptr + row * Q_WIDTH + at, tl.load(source, mask=ok, cache_modifier=".cv"), mask=ok)


class HostExchange:
    """Launches them for every layer. Owns the state of deferred rows that wait."""

    def __init__(
        self,
        offsets: StepOffsets,
        layers: int,
        rows: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device | str,
        deadline_seconds: float,
    ) -> None:
        """rows: deferred ones of a sweep, padded; 0 where none are."""
        self.offsets = offsets
        self.rows = rows
        self._layers = layers
        self._q_width = query_heads * head_dim
        self._kv_width = kv_heads * head_dim
        self._deadline_ns = int(1e9 * deadline_seconds)
        self.parked = torch.zeros(layers, rows, hidden, dtype=dtype, device=device)
        """The state in front of each layer's end of the rows that wait for its attention."""
        bells = LANES * layers * offsets.bell_stride
        at_rest = torch.zeros(offsets.submitted + bells, dtype=torch.uint8)
        self._at_rest = at_rest.pin_memory() if torch.device(device).type == "cuda" else at_rest
        self.status = torch.zeros(1, dtype=torch.int32, device=device)
        """Not 0: the host did not come in time; what it should have given is not there."""

    @property
    def nowhere(self) -> int:
        """The address of memory that stands for control memory while there is no session."""
        return self._at_rest.data_ptr()

    def deferred(self, layer: int) -> Crossing:
        """In `counts` is how many leave in each layer; those that arrive there leave in the next
        one."""
        return Crossing(layer, leaving=layer, arriving=layer + 1, back=1)

    def waited(self, lane: int, layer: int) -> Crossing:
        """In `counts` is how many rows each lane has."""
        return Crossing(lane * self._layers + layer, leaving=lane, arriving=lane, back=0)

    def depart(
        self,
        at: Crossing,
        q: torch.Tensor,
        kv: torch.Tensor,
        bases: torch.Tensor,
        counts: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        """q: `[rows, query_heads, head_dim]`. kv: `[rows / 16 or more, 2, kv_heads, 16, head_dim]`,
        K and V. bases: int64 `[2]`, addresses of control and step memory. counts: int32
        `[layers + 2]`: as `deferred` or `waited` says, and last the sweep's number. residual, of
        deferred rows: `[rows, hidden]`; afterwards that of the rows that arrive."""
        rows = q.shape[0]
        check("q", q, (rows, -1, -1), *FLOATS)
        check("kv", kv, (-1, 2, -1, 16, q.shape[2]), q.dtype)
        assert len(kv) * 16 >= rows
        check("bases", bases, (2,), torch.int64)
        check("counts", counts, (self._layers + 2,), torch.int32)
        offsets, hidden, parked = self.offsets, self.parked.shape[2], q
        copies = triton.cdiv(self._q_width + 2 * self._kv_width, _CHUNK)
        parts = copies
        if residual is not None:
            check("residual", residual, (self.rows, hidden), q.dtype)
            assert rows == self.rows
            parked, parts = self.parked[at.place], copies + triton.cdiv(hidden, _CHUNK)
        _depart_kernel[(rows, parts)](
            q, kv, q if residual is None else residual, parked, bases, counts,
            at.place, at.leaving, self._layers + 1, offsets.slot, offsets.q, offsets.kv,
            Q_WIDTH=self._q_width, KV_WIDTH=self._kv_width, DIM=q.shape[2], HIDDEN=hidden,
            COPY_PARTS=copies, CHUNK=_CHUNK, num_warps=4,
        )  # fmt: skip

    def ring(self, at: Crossing, bases: torch.Tensor, counts: torch.Tensor) -> None:
        """After `depart`: the host may begin with the rows that left."""
        offsets = self.offsets
        _ring_kernel[(1,)](
            bases, counts, at.place, self._layers + 1, offsets.submitted, offsets.bell_stride,
            num_warps=1,
        )  # fmt: skip

    def arrive(
        self, at: Crossing, out: torch.Tensor, bases: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Wait for those that have left. out: `[rows, query_heads, head_dim]`; rows that nobody
        arrives in stay as they are."""
        check("out", out, (-1, -1, -1), *FLOATS)
        offsets = self.offsets
        _wait_kernel[(1,)](
            bases, counts, self.status, at.place, at.arriving, self._layers + 1,
            offsets.done, offsets.bell_stride, offsets.revoked, self._deadline_ns,
            BACK=at.back, POLLS=_POLLS, MOST_POLLS=_MOST_POLLS, num_warps=1,
        )  # fmt: skip
        _arrive_kernel[(out.shape[0], triton.cdiv(self._q_width, _CHUNK))](
            out, bases, counts, self.status, at.place, at.arriving, self._layers + 1,
            offsets.slot, offsets.q + 2 * offsets.kv,
            BACK=at.back, Q_WIDTH=self._q_width, CHUNK=_CHUNK, num_warps=4,
        )  # fmt: skip
