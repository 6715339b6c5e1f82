"""From planned rows to the tensors of one sub-batch: built once per sweep, so that no layer touches
a token in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_service.kv.table import blocks_for, slots_of
from gpu_service.pipeline.device_kv import DecodeTables
from gpu_service.pipeline.prefill import ChunkMasks
from gpu_service.scheduling.plan import DecodeRow, PrefillRow, SubBatch, Tier


@dataclass(frozen=True)
class Chunk:
    """A prompt chunk's place in the sub-batch."""

    key: int
    tier: Tier
    rows: slice
    """Its rows of the dense state."""
    slots: torch.Tensor
    """`[tokens]` int64 on its tier: where the chunk's KV goes."""
    earlier_slots: torch.Tensor
    """`[start]` int64: where that of earlier tokens is."""
    masks: ChunkMasks


@dataclass(frozen=True)
class DeviceBatch:
    """One sub-batch on the device. Rows: prefill chunks, GPU decode, streamed, host decode."""

    token_ids: torch.Tensor
    """`[tokens]` int64"""
    positions: torch.Tensor
    """`[tokens]` int64"""
    chunks: tuple[Chunk, ...]
    gpu_rows: slice
    gpu_tables: DecodeTables | None
    """None without GPU decode rows."""
    streamed_rows: slice
    streamed_keys: tuple[int, ...]
    streamed_tables: DecodeTables | None
    """Of the host pool; None without streamed rows."""
    host_rows: slice
    host_keys: tuple[int, ...]
    """Choices of the host decode rows."""
    host_tables: DecodeTables | None
    """None without host decode rows."""


def device_batch(batch: SubBatch, block_tokens: int, device: torch.device) -> DeviceBatch:
    """One copy to the device for ids and positions together."""
    total = batch.tokens
    numbers = np.empty((2, total), dtype=np.int64)
    chunks: list[Chunk] = []
    place = 0
    for row in batch.prefill:
        end = place + len(row.token_ids)
        numbers[0, place:end] = row.token_ids
        numbers[1, place:end] = np.arange(row.start, row.start + end - place)
        chunks.append(_chunk(row, slice(place, end), block_tokens, device))
        place = end
    gpu_rows = slice(place, place + len(batch.gpu_decode))
    streamed_rows = slice(gpu_rows.stop, gpu_rows.stop + len(batch.streamed))
    decode = (*batch.gpu_decode, *batch.streamed, *batch.host_decode)
    if decode:
        numbers[0, place:] = [row.token_id for row in decode]
        numbers[1, place:] = [row.length - 1 for row in decode]
    on_device = torch.from_numpy(numbers).to(device)
    return DeviceBatch(
        token_ids=on_device[0],
        positions=on_device[1],
        chunks=tuple(chunks),
        gpu_rows=gpu_rows,
        gpu_tables=decode_tables(batch.gpu_decode, block_tokens),
        streamed_rows=streamed_rows,
        streamed_keys=tuple(row.key for row in batch.streamed),
        streamed_tables=decode_tables(batch.streamed, block_tokens),
        host_rows=slice(streamed_rows.stop, total),
        host_keys=tuple(row.key for row in batch.host_decode),
        host_tables=decode_tables(batch.host_decode, block_tokens),
    )


def decode_tables(rows: Sequence[DecodeRow], block_tokens: int) -> DecodeTables | None:
    if not rows:
        return None
    lengths: npt.NDArray[np.int32] = np.array([row.length for row in rows], dtype=np.int32)
    width = blocks_for(int(lengths.max()), block_tokens)
    tables = np.zeros((len(rows), width), dtype=np.int32)
    for target, row in zip(tables, rows, strict=True):
        # A table may be longer than the row needs; the rest of a shorter one stays 0.
        known = row.blocks[:width]
        target[: len(known)] = known
    return DecodeTables(lengths, tables)


def _chunk(row: PrefillRow, rows: slice, block_tokens: int, device: torch.device) -> Chunk:
    tokens = len(row.token_ids)
    slots = slots_of(row.blocks, 0, row.start + tokens, block_tokens)
    # The host tier's slots stay in host memory: it is the host that reads them.
    at = device if row.tier is Tier.GPU else torch.device("cpu")
    on_tier = torch.from_numpy(slots).to(at)
    return Chunk(
        key=row.key,
        tier=row.tier,
        rows=rows,
        slots=on_tier[row.start :],
        earlier_slots=on_tier[: row.start],
        masks=ChunkMasks(row.start, tokens, device),
    )
