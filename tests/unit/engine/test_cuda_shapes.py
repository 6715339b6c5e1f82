"""Padded sizes of sweeps with host rows that are waited for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service.pipeline.cuda.inputs import SweepShape
from gpu_service.pipeline.cuda.shapes import ShapeTable, shape_table
from gpu_service.scheduling.plan import DecodeRow, PrefillRow, SubBatch, Tier

MAX_RUNNING, BATCH_TOKENS = 256, 2048
BLOCKS = np.zeros(1, np.int32)
TABLES = {lanes: shape_table(MAX_RUNNING, BATCH_TOKENS, lanes=lanes) for lanes in (1, 2)}
CAPTURED = {lanes: set(table.captured()) for lanes, table in TABLES.items()}


def batch_of(decode: int, chunks: list[int]) -> SubBatch:
    return SubBatch(
        prefill=tuple(
            PrefillRow(1000 + key, Tier.GPU, 0, (0,) * tokens, BLOCKS, False)
            for key, tokens in enumerate(chunks)
        ),
        gpu_decode=tuple(DecodeRow(key, 0, 1, BLOCKS) for key in range(decode)),
    )


def check_holds(table: ShapeTable, shape: SweepShape, batch: SubBatch, lanes: list[int]) -> None:
    prefill = sum(len(chunk.token_ids) for chunk in batch.prefill)
    assert shape.decode >= len(batch.gpu_decode)
    assert shape.prefill >= prefill
    assert shape.chunks >= len(batch.prefill)
    assert (shape.prefill > 0) == (shape.chunks > 0) == (prefill > 0)
    assert shape.host >= lanes[0]
    assert shape.second >= sum(lanes[1:])
    assert (shape.second > 0) == (sum(lanes[1:]) > 0)
    assert shape.host + shape.second <= table.host_rows(MAX_RUNNING)
    assert shape.decode == 0 or any(size >= shape.decode for size in table.decode)


@settings(max_examples=300, deadline=None)
@given(
    decode=st.integers(0, MAX_RUNNING),
    chunks=st.lists(st.integers(1, 400), max_size=20),
    lanes=st.tuples(st.integers(0, MAX_RUNNING), st.integers(0, MAX_RUNNING)),
    both=st.booleans(),
)
def test_a_shape_holds_its_sweep(
    decode: int, chunks: list[int], lanes: tuple[int, int], both: bool
) -> None:
    if not 0 < sum(lanes) <= MAX_RUNNING:
        lanes = (1, 0)
    rows = [lanes[0], lanes[1]] if both else [sum(lanes)]
    table, batch = TABLES[len(rows)], batch_of(decode, chunks)
    check_holds(table, table.shape_for(batch, lanes=rows), batch, rows)


@pytest.mark.parametrize(
    ("decode", "chunks", "lanes"),
    [
        (0, [], [1]),
        (0, [], [0, 1]),
        (0, [], [16, 16]),
        (16, [], [60, 64]),
        (100, [], [30, 40]),
        (128, [], [128, 128]),
        (0, [300], [10, 20]),
        (64, [100, 28], [64, 1]),
        (16, [200], [128]),
        (10, [3] * 16, [5, 5]),
        (64, [64], [256]),
    ],
)
def test_sweeps_of_up_to_512_rows_are_captured(
    decode: int, chunks: list[int], lanes: list[int]
) -> None:
    table = TABLES[len(lanes)]
    assert table.shape_for(batch_of(decode, chunks), lanes=lanes) in CAPTURED[len(lanes)]


@pytest.mark.parametrize("lanes", TABLES)
def test_captured_shapes_are_few_and_no_larger_than_promised(lanes: int) -> None:
    found = list(TABLES[lanes].captured())
    assert len(found) == len(set(found)) < 240
    assert max(shape.all_rows for shape in found) == 512
