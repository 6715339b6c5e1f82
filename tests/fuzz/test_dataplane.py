"""Lying shared memory: whatever an engine writes into the control memory, the worker neither
crashes nor leaves the session's pool, and says what was wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.cpu.dataplane import WaitStatus, WorkerError
from tests.support.dataplane import BLOCKS, SECOND_US, SHAPE, Rig, rig

WORD = 4
LINE = 64 // WORD
HEADER = 4 * LINE
PUBLISHED = 2 * LINE
RING = HEADER + 2 * SHAPE.layers * 2 * LINE
CONTROL_WORDS = SHAPE.sizes()[0] // WORD
RECORD = (CONTROL_WORDS - RING) // 4
RANGES = LINE
LENGTHS = RANGES + 2 * SHAPE.layers * 2
IDS = LENGTHS + SHAPE.max_rows
GUARD = 4096


def words(it: Rig) -> np.ndarray:
    return np.frombuffer(it.control, np.int32)


def record_of(it: Rig, sweep: int) -> np.ndarray:
    start = RING + sweep % 4 * RECORD
    return words(it)[start : start + RECORD]


def publish_lie(it: Rig, offset: int, value: int) -> WaitStatus:
    """A correct sweep, but for one word of its record."""
    it.restart(start=False)
    assert it.channel.begin_sweep([it.rows([20, 33])], SECOND_US) is WaitStatus.OK
    record = record_of(it, it.channel.sweep)
    assert record[0] == it.channel.sweep, "the layout of the ring has moved"
    assert list(record[LENGTHS : LENGTHS + 2]) == [20, 33]
    record[offset] = value
    for layer in range(SHAPE.layers):
        it.channel.submit(0, layer, *it.inputs(2))
    it.worker.start()
    out = np.empty((2, SHAPE.query_heads, SHAPE.head_dim), np.float32)
    return it.channel.wait(0, SHAPE.layers - 1, out, SECOND_US)


LIES = {
    "sweep": (0, 77),
    "negative rows": (3, -1),
    "too many rows": (3, SHAPE.max_rows + 1),
    "huge rows": (3, 2**31 - 1),
    "rows of the other lane": (4, 2**31 - 1),
    "negative range": (RANGES, -1),
    "inverted range": (RANGES, 3),
    "range past the rows": (RANGES + 1, 3),
    "length 0": (LENGTHS, 0),
    "negative length": (LENGTHS, -5),
    "length beyond the table": (LENGTHS + 1, SHAPE.max_blocks_per_row * 16 + 1),
    "huge length": (LENGTHS + 1, 2**31 - 1),
    "block past the pool": (IDS, BLOCKS),
    "negative block": (IDS + 1, -1),
    "smallest block": (IDS + 1, -(2**31)),
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.replace(" ", "-"))
def test_a_bad_record_is_an_error_of_its_session(lie: str) -> None:
    with rig() as it, rig() as neighbour:
        before = bytes(it.pool_memory)
        assert publish_lie(it, *LIES[lie]) is WaitStatus.FAILED
        expected = WorkerError.BAD_SEQUENCE if lie == "sweep" else WorkerError.BAD_RECORD
        assert it.channel.error is expected
        assert it.stopped_by_itself()
        assert bytes(it.pool_memory) == before
        for out, right in neighbour.sweep(neighbour.rows([20])):
            np.testing.assert_array_equal(out, right)


def test_a_record_published_far_ahead_is_refused() -> None:
    with rig() as it:
        it.sweep(it.rows([5]))
        it.restart(start=False)
        it.channel.begin_sweep([it.rows([5])], SECOND_US)
        words(it)[PUBLISHED] = 1000
        it.worker.start()
        assert it.channel.cancel_sweep(SECOND_US) is WaitStatus.FAILED
        assert it.channel.error is WorkerError.BAD_SEQUENCE


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    scribbles=st.lists(
        st.tuples(
            st.integers(PUBLISHED, CONTROL_WORDS - 1),
            st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 70),
        ),
        max_size=12,
    ),
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=3),
)
def test_scribbles_never_crash_or_escape(
    scribbles: list[tuple[int, int]], lengths: list[int]
) -> None:
    """Written while a sweep is under way, wherever they fall; memory after the pool's last block
    stays as it was, and the next epoch on the same pool is correct."""
    with rig() as it:
        used = it.pool.layout.pool_bytes(BLOCKS)
        it.pool_memory[used:] = b"g" * (len(it.pool_memory) - used)
        it.channel.begin_sweep([it.rows(lengths)], SECOND_US)
        it.channel.submit(0, 0, *it.inputs(len(lengths)))
        for place, value in scribbles:
            words(it)[place] = value
        out = np.empty((len(lengths), SHAPE.query_heads, SHAPE.head_dim), np.float32)
        for layer in range(SHAPE.layers):
            if layer > 0:
                it.channel.submit(0, layer, *it.inputs(len(lengths)))
            it.channel.wait(0, layer, out, 20_000)
        it.worker.stop()
        assert it.pool_memory[used:] == b"g" * (len(it.pool_memory) - used)
        it.restart()
        it.fill()
        for got, right in it.sweep(it.rows(lengths)):
            np.testing.assert_array_equal(got, right)
