"""Channel and worker on shared memory: results, counters, deadlines, and who wakes whom."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from kernels.cpu.dataplane import StepChannel, StepMemory, WaitStatus, WorkerError
from tests.support.dataplane import BLOCKS, SECOND_US, SHAPE, Floats, Ints, Rig, anonymous, rig


def test_both_lanes_give_exactly_what_the_kernel_gives() -> None:
    with rig() as it:
        for lengths in ([1, 16, 17], [15, 64, 33], [2]):
            for out, expected in it.sweep(it.rows(lengths), it.rows([5, 48])):
                np.testing.assert_array_equal(out, expected)
        stats = it.worker.stats()
        assert stats.sweeps >= 2
        assert stats.rows == SHAPE.layers * (5 + 5 + 3)
        assert stats.kv_bytes_read > 0
        assert sum(stats.layers) == SHAPE.layers * 2 * 3
        assert stats.backlog == 0


def test_the_worker_counts_what_it_waits_for_within_a_sweep_alone() -> None:
    with rig() as it:
        lane, pause, start = it.rows([20]), 0.05, time.monotonic()
        time.sleep(pause)  # no sweep yet: idle, not waiting
        assert it.worker.stats().wait_seconds == 0
        assert it.channel.begin_sweep([lane], SECOND_US) is WaitStatus.OK
        for layer in range(SHAPE.layers):
            time.sleep(pause)  # what the engine would compute
            np.testing.assert_array_equal(*attend(it, layer, lane, (0, 1)))
        stats = it.worker.stats()
        assert 1 <= stats.waits <= SHAPE.layers
        assert SHAPE.layers * pause * 0.9 <= stats.wait_seconds <= time.monotonic() - start
        assert stats.parks >= 1


@pytest.mark.parametrize("threads", [1, 3])
def test_layers_that_wait_together_give_what_each_gives_alone(threads: int) -> None:
    """More of them than are attended at once, with windows of their own."""
    shape = replace(SHAPE, layers=11)
    windows = tuple(7 * (layer % 3) for layer in range(shape.layers))
    with rig(shape=shape, windows=windows, threads=threads) as it:
        it.restart(start=False)
        lane = it.rows([40, 3, 64])
        assert it.channel.begin_sweep([lane], SECOND_US) is WaitStatus.OK
        inputs = [it.inputs(3) for _ in range(shape.layers)]
        for layer, arrays in enumerate(inputs):
            it.channel.submit(0, layer, *arrays)
        it.worker.start()
        for layer, arrays in enumerate(inputs):
            out = np.full_like(arrays[0], np.nan)
            assert it.channel.wait(0, layer, out, SECOND_US) is WaitStatus.OK
            np.testing.assert_array_equal(out, it.expected(layer, lane, arrays))
        assert sum(it.worker.stats().layers) == shape.layers


def test_backlog_is_what_has_been_rung_for_and_is_not_done() -> None:
    with rig() as it:
        it.restart(start=False)
        lane = it.rows([20])
        assert it.channel.begin_sweep([lane], SECOND_US) is WaitStatus.OK
        it.channel.submit(0, 0, *it.inputs(1))
        assert it.worker.stats().backlog == 1
        it.worker.start()
        assert it.channel.wait(0, 0, it.inputs(1)[0], SECOND_US) is WaitStatus.OK
        assert it.worker.stats().backlog == 0


@pytest.mark.parametrize("mutant", ["scale", "window", "layer", "table"])
def test_the_comparison_can_fail(mutant: str) -> None:
    """What differs between worker and reference must show."""
    options = {"scale": {"scale": 0.26}, "window": {"windows": (0, 7)}}.get(mutant, {})
    with rig(**options) as it, rig() as plain:
        if mutant == "layer":
            it.pool_memory[: len(it.pool_memory) // 2] = it.pool_memory[len(it.pool_memory) // 2 :]
        lane = it.rows([40, 20])
        plain_lane = lane if mutant != "table" else (lane[0], lane[1][::-1].copy())
        assert it.channel.begin_sweep([lane], SECOND_US) is WaitStatus.OK
        same = True
        for layer in range(SHAPE.layers):
            inputs = it.inputs(2)
            out = np.empty_like(inputs[0])
            it.channel.submit(0, layer, *inputs)
            assert it.channel.wait(0, layer, out, SECOND_US) is WaitStatus.OK
            same &= np.array_equal(out, plain.expected(layer, plain_lane, inputs))
        assert not same


def test_sliding_windows_are_per_layer() -> None:
    with rig(windows=(0, 7)) as it:
        for out, expected in it.sweep(it.rows([40, 3])):
            np.testing.assert_array_equal(out, expected)


def test_each_layer_may_have_rows_of_its_own() -> None:
    """As in deferred mode: a layer's slot holds its cohort's rows alone."""
    with rig() as it:
        lane = it.rows([20, 33, 5])
        cohorts = [(1, 3), (0, 1)]
        status = it.channel.begin_sweep([lane], SECOND_US, ranges=np.array(cohorts, np.int32))
        assert status is WaitStatus.OK
        for layer, cohort in enumerate(cohorts):
            np.testing.assert_array_equal(*attend(it, layer, lane, cohort))


def test_a_layer_without_rows_is_submitted_too() -> None:
    with rig() as it:
        lane = it.rows([20])
        ranges = np.array([(0, 1), (1, 1)], np.int32)
        assert it.channel.begin_sweep([lane], SECOND_US, ranges=ranges) is WaitStatus.OK
        np.testing.assert_array_equal(*attend(it, 0, lane, (0, 1)))
        it.channel.submit(0, 1, *it.inputs(0))
        with pytest.raises(ValueError, match="nothing was submitted for lane 0, layer 1"):
            it.channel.wait(0, 1, it.inputs(0)[0], SECOND_US)
        it.sweep(it.rows([5]))


def test_results_of_the_sweep_before_are_there_until_the_next_one() -> None:
    """A cohort's result is waited for a sweep later, while its slot's other half fills."""
    with rig() as it:
        pending: list[Floats] = []
        for _ in range(4):
            lane = it.rows([20, 33])
            assert it.channel.begin_sweep([lane], SECOND_US) is WaitStatus.OK
            earlier, pending = pending, []
            for layer in range(SHAPE.layers):
                inputs = it.inputs(2)
                it.channel.submit(0, layer, *inputs)
                pending.append(it.expected(layer, lane, inputs))
                if earlier:
                    out = np.full_like(inputs[0], np.nan)
                    assert it.channel.wait(0, layer, out, SECOND_US, back=1) is WaitStatus.OK
                    np.testing.assert_array_equal(out, earlier[layer])


def attend(
    it: Rig, layer: int, lane: tuple[Ints, Ints], cohort: tuple[int, int]
) -> tuple[Floats, Floats]:
    """One layer of the rows `cohort[0]` to `cohort[1]` of the lane; the kernel's result, too."""
    rows = slice(*cohort)
    inputs = it.inputs(cohort[1] - cohort[0])
    out = np.full_like(inputs[0], np.nan)
    it.channel.submit(0, layer, *inputs)
    assert it.channel.wait(0, layer, out, SECOND_US) is WaitStatus.OK
    return out, it.expected(layer, (lane[0][rows].copy(), lane[1][rows].copy()), inputs)


def test_counters_wrap() -> None:
    with rig(first_sweep=(1 << 32) - 3) as it:
        for _ in range(8):
            for out, expected in it.sweep(it.rows([20]), it.rows([9])):
                np.testing.assert_array_equal(out, expected)
        assert it.channel.sweep == 4  # 2^32 - 3 + 7


def test_an_idle_lane_does_not_look_rung_after_two_billion_sweeps() -> None:
    """Lane 1 was last used 2^31 + 2 sweeps ago; its doorbells are refreshed every 2^28."""
    with rig(first_sweep=(1 << 28) - 1) as it:
        it.sweep(it.rows([20]), it.rows([9]))
        it.sweep(it.rows([20]))
        assert it.channel.begin_sweep([it.rows([20]), it.rows([9])], SECOND_US) is WaitStatus.OK
        bells = np.frombuffer(it.control, np.uint32)
        assert (bells == (1 << 28) - 1).sum() > 2 * SHAPE.layers


def test_lanes_do_not_wait_for_each_other() -> None:
    with rig() as it:
        lanes = [it.rows([30]), it.rows([30])]
        assert it.channel.begin_sweep(lanes, SECOND_US) is WaitStatus.OK
        for layer in range(SHAPE.layers):  # all of lane 1 before any of lane 0
            inputs = it.inputs(1)
            out = np.empty_like(inputs[0])
            it.channel.submit(1, layer, *inputs)
            assert it.channel.wait(1, layer, out, SECOND_US) is WaitStatus.OK
            np.testing.assert_array_equal(out, it.expected(layer, lanes[1], inputs))


def test_a_wait_ends_at_its_deadline_and_leaves_out_alone() -> None:
    with rig() as it:
        assert it.channel.begin_sweep([it.rows([4])], SECOND_US) is WaitStatus.OK
        it.worker.stop()
        inputs = it.inputs(1)
        out = np.full_like(inputs[0], 3.0)
        it.channel.submit(0, 0, *inputs)
        assert (
            it.channel.wait(0, 0, out, SECOND_US) is WaitStatus.FAILED
        )  # stopped: no need to wait
        assert (out == 3.0).all()


def test_an_unserved_channel_times_out() -> None:
    control, step = (anonymous(size) for size in SHAPE.sizes())
    memory = StepMemory(SHAPE, control, step)
    memory.format(1, bytes(16))
    channel = StepChannel(memory, BLOCKS)
    lane = (np.array([4], np.int32), np.zeros((1, 1), np.int32))
    assert channel.begin_sweep([lane], 10_000) is WaitStatus.OK
    q = np.zeros((1, SHAPE.query_heads, SHAPE.head_dim), np.float32)
    kv = np.zeros((1, SHAPE.kv_heads, SHAPE.head_dim), np.float32)
    channel.submit(0, 0, q, kv, kv)
    start = time.monotonic()
    assert channel.wait(0, 0, q, 50_000) is WaitStatus.TIMED_OUT
    assert 0.045 < time.monotonic() - start < 2
    for layer in range(1, SHAPE.layers):
        channel.submit(0, layer, q, kv, kv)
    assert channel.begin_sweep([lane], 10_000) is WaitStatus.OK  # the other slot
    assert channel.cancel_sweep(10_000) is WaitStatus.TIMED_OUT


def test_abort_ends_a_parked_wait_at_once() -> None:
    with rig() as it:
        it.channel.begin_sweep([it.rows([4])], SECOND_US)
        it.channel.submit(0, 0, *it.inputs(1))
        out = np.empty((1, SHAPE.query_heads, SHAPE.head_dim), np.float32)
        assert it.channel.wait(0, 0, out, SECOND_US) is WaitStatus.OK
        it.channel.abort()
        start = time.monotonic()
        assert it.channel.cancel_sweep(20 * SECOND_US) is WaitStatus.ABORTED
        assert time.monotonic() - start < 1


def test_abort_from_another_thread_wakes_the_engine() -> None:
    control, step = (anonymous(size) for size in SHAPE.sizes())
    memory = StepMemory(SHAPE, control, step)
    memory.format(1, bytes(16))
    channel = StepChannel(memory, BLOCKS)
    channel.begin_sweep([(np.array([4], np.int32), np.zeros((1, 1), np.int32))], 1000)
    timer = threading.Timer(0.1, channel.abort)
    timer.start()
    start = time.monotonic()
    assert channel.cancel_sweep(20 * SECOND_US) is WaitStatus.ABORTED
    assert time.monotonic() - start < 5
    timer.join()


def test_a_cancelled_sweep_is_over_and_the_next_one_is_whole() -> None:
    with rig() as it:
        for _ in range(5):
            assert it.channel.begin_sweep([it.rows([30]), it.rows([9])], SECOND_US) is WaitStatus.OK
            it.channel.submit(0, 0, *it.inputs(1))
            assert it.channel.cancel_sweep(SECOND_US) is WaitStatus.OK
            it.pool_memory[:] = bytes(len(it.pool_memory))  # nobody is using it
            it.fill()
            for out, expected in it.sweep(it.rows([30])):
                np.testing.assert_array_equal(out, expected)


def test_a_new_sweep_cancels_one_that_was_left_half_way() -> None:
    with rig() as it:
        it.channel.begin_sweep([it.rows([30])], SECOND_US)
        for out, expected in it.sweep(it.rows([17, 2])):
            np.testing.assert_array_equal(out, expected)


def test_a_revoked_worker_stops_by_itself() -> None:
    with rig() as it:
        it.sweep(it.rows([5]))
        it.channel.revoke()
        assert it.stopped_by_itself()
        assert it.channel.begin_sweep([it.rows([5])], SECOND_US) is WaitStatus.OK
        assert it.channel.cancel_sweep(SECOND_US) is WaitStatus.FAILED
        assert it.channel.error is WorkerError.NONE


@pytest.mark.parametrize(
    ("lengths", "tables", "message"),
    [
        ([0], [[0]], "length 0"),
        ([17], [[0]], "length 17"),
        ([65], [[0, 1, 2, 3, 4]], "length 65"),
        ([5], [[BLOCKS]], f"block id {BLOCKS}"),
        ([5], [[-1]], "block id -1"),
        ([5] * 7, [[0]] * 7, "7 rows"),
        ([[5]], [[0]], "lengths"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_the_engine_itself(
    lengths: list[int], tables: list[list[int]], message: str
) -> None:
    with rig() as it:
        lane = (np.array(lengths, np.int32), np.array(tables, np.int32))
        with pytest.raises(ValueError, match=message):
            it.channel.begin_sweep([lane], SECOND_US)
        it.sweep(it.rows([5]))  # and the channel is as good as before


def test_calls_out_of_order_are_refused() -> None:
    with rig() as it:
        out = np.empty((1, SHAPE.query_heads, SHAPE.head_dim), np.float32)
        it.channel.begin_sweep([it.rows([5])], SECOND_US)
        with pytest.raises(ValueError, match="nothing was submitted"):
            it.channel.wait(0, 0, out, 0)
        with pytest.raises(ValueError, match="lane 1"):
            it.channel.submit(1, 0, *it.inputs(0))
        with pytest.raises(ValueError, match="layer 2"):
            it.channel.submit(0, SHAPE.layers, *it.inputs(1))
        with pytest.raises(ValueError, match="contiguous"):
            it.channel.submit(0, 0, *it.inputs(2))


def test_memory_of_another_epoch_or_shape_is_refused() -> None:
    control, step = (anonymous(size) for size in SHAPE.sizes())
    memory = StepMemory(SHAPE, control, step)
    with pytest.raises(ValueError, match="layout version"):
        memory.check(1, bytes(16))
    memory.format(1, bytes(16))
    memory.check(1, bytes(16))
    with pytest.raises(ValueError, match="not the one"):
        memory.check(2, bytes(16))
    with pytest.raises(ValueError, match="not the one"):
        memory.check(1, b"x" * 16)
    memory.write_engine_nonce(b"n" * 16)
    assert memory.read_engine_nonce() == b"n" * 16
    control[8] ^= 0xFF  # the layout version
    with pytest.raises(ValueError, match="layout version"):
        memory.check(1, bytes(16))
    with pytest.raises(ValueError, match="smaller"):
        StepMemory(SHAPE, control, anonymous(4096)).check(1, bytes(16))


def test_an_idle_worker_uses_no_cpu() -> None:
    with rig() as it:
        it.sweep(it.rows([5]))
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.02


def test_a_worker_waits_for_doorbells_that_a_device_rings() -> None:
    """No futex wake: inputs and counters are written as a GPU would, long after the spin window."""
    with rig(spin_us=10) as it:
        lane = it.rows([30])
        assert it.channel.begin_sweep([lane], SECOND_US, device_rings=True) is WaitStatus.OK
        time.sleep(0.02)
        control = np.frombuffer(it.control, np.uint32)
        slot_bytes = SHAPE.sizes()[1] // (2 * SHAPE.layers * 2)
        for layer in range(SHAPE.layers):
            inputs = it.inputs(1)
            place = (layer * 2 + it.channel.sweep % 2) * slot_bytes
            for array, row_bytes in zip(
                inputs,
                (SHAPE.query_row_bytes, SHAPE.kv_row_bytes, SHAPE.kv_row_bytes),
                strict=True,
            ):
                it.step[place : place + array.nbytes] = array.tobytes()
                place += SHAPE.max_rows * row_bytes
            submitted = 4 * 16 + layer * 2 * 16
            assert control[submitted] == 0, "the layout of the doorbells has moved"
            control[submitted] = it.channel.sweep
            out = np.empty_like(inputs[0])
            assert it.channel.wait(0, layer, out, SECOND_US) is WaitStatus.OK
            np.testing.assert_array_equal(out, it.expected(layer, lane, inputs))
