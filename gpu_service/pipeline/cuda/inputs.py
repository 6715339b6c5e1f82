"""What a sweep needs to know, packed by the host and sent to the device in one copy.

    rows:       | decode, padded | prompt chunks, one behind the other, padded | host rows |
    sequences:  | decode, padded | chunks, padded |          one block table each
    samples:    | decode, padded | chunks that end in the last known token, padded | host rows |

Decode rows are those of the GPU tier, then streamed ones. Tables of streamed rows, and of chunks
for the host tier, name blocks in staging (`gpu_service.pipeline.cuda.staging`). Host rows are those
of the first sub-batch, padded, then those of the second, padded. Padding rows read token 0 at
position 0 and store nothing (slot -1); padding sequences have no blocks and no length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_service.kv.table import blocks_for, slots_of
from gpu_service.pipeline.cuda.host_ring import Brought, Longs
from gpu_service.pipeline.cuda.staging import Ints, StagedSequences, staging_arrays
from gpu_service.scheduling.plan import PENDING_TOKEN, DecodeRow, PrefillRow, SubBatch, Tier


@dataclass(frozen=True)
class SweepShape:
    """Padded sizes: what a CUDA graph fixes."""

    decode: int
    """Decode rows that attend on the device."""
    prefill: int
    """Rows of prompt chunks."""
    chunks: int
    """Prompt chunks; 0 if and only if `prefill` is."""
    host: int = 0
    """Host rows beside them."""
    second: int = 0
    """Those of the second sub-batch, which has no others."""

    @property
    def rows(self) -> int:
        """Without host rows."""
        return self.decode + self.prefill

    @property
    def all_rows(self) -> int:
        return self.rows + self.host + self.second

    @property
    def sequences(self) -> int:
        return self.decode + self.chunks

    @property
    def samples(self) -> int:
        return self.sequences + self.host + self.second


@dataclass(frozen=True)
class InputLimits:
    """Most of everything in one sweep."""

    rows: int
    """Host rows among them."""
    sequences: int
    table_blocks: int
    """Block ids of all sequences."""
    layers: int = 0
    host: int = 0
    """Host rows of all sub-batches; 0: never any."""
    deferred: int = 0
    """Host rows of each layer in deferred mode."""
    staging: int = 0
    """Blocks in staging."""


@dataclass(frozen=True)
class HostInputs:
    """What a sweep needs to know of its host rows."""

    lanes: Sequence[Sequence[DecodeRow]]
    """Those that begin with the sweep, by sub-batch."""
    counts: Ints
    """`[layers + 2]`: how many each lane has; in deferred mode, how many leave in each layer and
    how many come through the last one. Last the sweep's number."""
    bases: Longs
    """`[2]`: addresses of control and step memory."""
    positions: Ints | None = None
    """`[layers, rows]`, in deferred mode: of those that leave in each layer."""


class _Packed:
    """Named arrays in one run of bytes, on the host and again on the device."""

    _ALIGN = 256

    def __init__(self, sizes: Mapping[str, tuple[int, type[np.generic]]]) -> None:
        self.offsets: dict[str, int] = {}
        self.sizes = sizes
        self.bytes = 0
        for name, (count, kind) in sizes.items():
            self.offsets[name] = self.bytes
            step = count * np.dtype(kind).itemsize
            self.bytes += -(-step // self._ALIGN) * self._ALIGN

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {}
        for name, (count, kind) in self.sizes.items():
            begin, item = self.offsets[name], np.dtype(kind).itemsize
            wanted = torch.int64 if item == 8 else torch.int32
            found[name] = memory[begin : begin + count * item].view(wanted)
        return found


def _arrays(limits: InputLimits) -> dict[str, tuple[int, type[np.generic]]]:
    rows, sequences = limits.rows, limits.sequences
    return {
        "token_ids": (rows, np.int64),
        "positions": (rows, np.int64),
        "slots": (rows, np.int64),
        "samples": (sequences + limits.host, np.int64),
        "host_positions": (limits.layers * limits.deferred, np.int64),
        "host_bases": (2, np.int64),
        "host_counts": (limits.layers + 2, np.int32),
        "sources": (rows, np.int32),
        "lengths": (sequences, np.int32),
        "first_rows": (sequences + 1, np.int32),
        "table_starts": (sequences, np.int32),
        "table_counts": (sequences, np.int32),
        **staging_arrays(limits.staging),
        # Last, so that only what is used of it is sent.
        "blocks": (limits.table_blocks, np.int32),
    }


class SweepInputs:
    """Two staging areas on the host, used in turn, and the arrays on the device that kernels read.

    A staging area is written again two sweeps later; by then its copy has been made, since the
    sweep behind it has been waited for.
    """

    def __init__(self, limits: InputLimits, block_tokens: int, device: torch.device) -> None:
        self.limits = limits
        self._block_tokens = block_tokens
        self._packed = _Packed(_arrays(limits))
        size = self._packed.bytes
        pin = device.type == "cuda"
        self._staging = [torch.zeros(size, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self._host = [
            {name: view.numpy() for name, view in self._packed.views(staging).items()}
            for staging in self._staging
        ]
        self._memory = torch.zeros(size, dtype=torch.uint8, device=device)
        device_views = self._packed.views(self._memory)
        self.token_ids = device_views["token_ids"]
        """int64 `[rows]`"""
        self.sources = device_views["sources"]
        """int32 `[rows]`: index into the tokens that the sweep before drew; -1: `token_ids`."""
        self.positions = device_views["positions"]
        """int64 `[rows]`"""
        self.slots = device_views["slots"]
        """int64 `[rows]`: where K and V go; -1 for padding."""
        self.samples = device_views["samples"]
        """int64 `[samples]`: rows whose next token is drawn."""
        self.host_positions = device_views["host_positions"].view(limits.layers, limits.deferred)
        """int64 `[layers, deferred rows]`"""
        self.host_bases = device_views["host_bases"]
        """int64 `[2]`"""
        self.host_counts = device_views["host_counts"]
        """int32 `[layers + 2]`"""
        self.lengths = device_views["lengths"]
        """int32 `[sequences]`: tokens attended, the sweep's own included; 0 for padding."""
        self.first_rows = device_views["first_rows"]
        """int32 `[chunks + 1]`: chunk c has the rows from `first_rows[c]` to `[c + 1]`, counted
        behind the decode rows."""
        self.table_starts = device_views["table_starts"]
        """int32 `[sequences]`: where in `blocks` a sequence's ids begin."""
        self.table_counts = device_views["table_counts"]
        """int32 `[sequences]`"""
        self.stream_pool = device_views["stream_pool"]
        """int64 `[2]`: the host pool's address, and the bytes of one layer of it."""
        self.stream_counts = device_views["stream_counts"]
        """int32 `[3]`: how many entries of `brought_to` and of `put` are used, and the number of
        layer 0 in the ring's words."""
        self.brought_to = device_views["brought"]
        """int32 `[staging]`: staging blocks."""
        self.put = device_views["put"].view(4, limits.staging)
        """int32 `[4, staging]`: staging block, host block, first token, end."""
        self.blocks = device_views["blocks"]
        """int32"""
        self.brought: Brought | None = None
        """What the sweep that was sent last reads of the host pool."""
        self._streamed_layers = 0
        self._turn = 0

    def send(
        self,
        batch: SubBatch,
        shape: SweepShape,
        drawn: Mapping[int, int],
        host: HostInputs | None = None,
        pool: Longs | None = None,
    ) -> dict[int, int]:
        """Fill and copy. Returns where each sampled choice's token will be, but for host rows.

        drawn: choice -> index of its token among those that the sweep before drew. pool: as
        `stream_pool`, if a row or chunk goes through staging.
        """
        assert (host is None) == (shape.host + shape.second == 0)
        self._turn ^= 1
        arrays = self._host[self._turn]
        self._clear(arrays, shape)
        staged = StagedSequences(arrays, self.limits.staging, self._block_tokens)
        if pool is not None:
            arrays["stream_pool"][:] = pool
        place = self._decode_rows(arrays, batch, drawn, staged)
        place, indices = self._chunk_rows(arrays, batch, shape, place, staged)
        self.brought = None if pool is None else staged.brought(pool, self._streamed_layers)
        if self.brought is not None:
            self._streamed_layers += self.limits.layers
        if host is not None:
            self._host_rows(arrays, host, shape, drawn)
        used = self._packed.offsets["blocks"] + 4 * place
        staging = self._staging[self._turn]
        self._memory[:used].copy_(staging[:used], non_blocking=True)
        decode = (*batch.gpu_decode, *batch.streamed)
        indices.update((row.key, i) for i, row in enumerate(decode))
        return indices

    def _clear(self, arrays: dict[str, npt.NDArray[np.generic]], shape: SweepShape) -> None:
        rows = shape.all_rows
        for name in ("token_ids", "positions"):
            arrays[name][:rows] = 0
        arrays["slots"][:rows] = -1
        arrays["sources"][:rows] = -1
        arrays["samples"][: shape.samples] = 0
        for name in ("lengths", "table_starts", "table_counts"):
            arrays[name][: shape.sequences] = 0

    def _host_rows(
        self,
        arrays: dict[str, npt.NDArray[np.generic]],
        host: HostInputs,
        shape: SweepShape,
        drawn: Mapping[int, int],
    ) -> None:
        for rows, first in zip(host.lanes, (shape.rows, shape.rows + shape.host), strict=False):
            for place, row in enumerate(rows, first):
                arrays["token_ids"][place] = row.token_id
                arrays["positions"][place] = row.length - 1
                if row.token_id == PENDING_TOKEN:
                    arrays["sources"][place] = drawn[row.key]
        arrays["samples"][shape.sequences : shape.samples] = np.arange(shape.rows, shape.all_rows)
        if host.positions is not None:
            arrays["host_positions"][:] = host.positions.ravel()
        arrays["host_counts"][:] = host.counts
        arrays["host_bases"][:] = host.bases

    def _decode_rows(
        self,
        arrays: dict[str, npt.NDArray[np.generic]],
        batch: SubBatch,
        drawn: Mapping[int, int],
        staged: StagedSequences,
    ) -> int:
        """Returns how many block ids were written."""
        rows, size = (*batch.gpu_decode, *batch.streamed), self._block_tokens
        count = len(rows)
        if not count:
            return 0
        lengths: Ints = np.fromiter((row.length for row in rows), np.int32, count)
        positions = lengths - 1
        arrays["lengths"][:count] = lengths
        arrays["positions"][:count] = positions
        arrays["token_ids"][:count] = np.fromiter((row.token_id for row in rows), np.int64, count)
        for i, row in enumerate(rows):
            if row.token_id == PENDING_TOKEN:
                arrays["sources"][i] = drawn[row.key]
        arrays["samples"][:count] = np.arange(count)
        last = positions // size
        own = len(batch.gpu_decode)
        tables = [row.blocks[: n + 1] for row, n in zip(rows[:own], last.tolist(), strict=False)]
        tables += [staged.place(r.blocks, r.length - 1, r.length) for r in batch.streamed]
        ends = np.cumsum(last + 1)
        blocks = arrays["blocks"]
        np.concatenate(tables, out=blocks[: ends[-1]])
        arrays["table_counts"][:count] = last + 1
        arrays["table_starts"][:count] = ends - (last + 1)
        arrays["slots"][:count] = blocks[ends - 1].astype(np.int64) * size + positions % size
        return int(ends[-1])

    def _chunk_rows(
        self,
        arrays: dict[str, npt.NDArray[np.generic]],
        batch: SubBatch,
        shape: SweepShape,
        place: int,
        staged: StagedSequences,
    ) -> tuple[int, dict[int, int]]:
        """Returns how many block ids there are now, and the samples of chunks."""
        first_rows = arrays["first_rows"]
        first_rows[0] = 0
        row, sequence, sample = shape.decode, shape.decode, shape.decode
        indices: dict[int, int] = {}
        for chunk in batch.prefill:
            place = self._chunk(arrays, chunk, sequence, row, place, staged)
            if chunk.samples:
                arrays["samples"][sample] = row + len(chunk.token_ids) - 1
                indices[chunk.key] = sample
                sample += 1
            row += len(chunk.token_ids)
            sequence += 1
            first_rows[sequence - shape.decode] = row - shape.decode
        # Chunks of padding have no rows.
        first_rows[sequence - shape.decode + 1 : shape.chunks + 1] = row - shape.decode
        return place, indices

    def _chunk(
        self,
        arrays: dict[str, npt.NDArray[np.generic]],
        chunk: PrefillRow,
        sequence: int,
        row: int,
        place: int,
        staged: StagedSequences,
    ) -> int:
        tokens = len(chunk.token_ids)
        length, rows = chunk.start + tokens, slice(row, row + tokens)
        blocks = chunk.blocks
        if chunk.tier is Tier.HOST:
            blocks = staged.place(blocks, chunk.start, length)
        arrays["token_ids"][rows] = chunk.token_ids
        arrays["positions"][rows] = np.arange(chunk.start, length)
        arrays["slots"][rows] = slots_of(blocks, chunk.start, tokens, self._block_tokens)
        arrays["lengths"][sequence] = length
        count = blocks_for(length, self._block_tokens)
        arrays["blocks"][place : place + count] = blocks[:count]
        arrays["table_starts"][sequence] = place
        arrays["table_counts"][sequence] = count
        return place + count
