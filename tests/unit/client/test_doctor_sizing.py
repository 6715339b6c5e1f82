"""Pools and threads from a machine's facts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_client.doctor.measure import thread_counts, with_rates
from neo_client.doctor.sizing import GIB, PROCESS_BYTES, Wishes, size
from neo_common.machine.facts import MemoryRate
from neo_common.shm.limits import MemoryHeadroom
from tests.unit.client.test_doctor import MACHINE

UNMEASURED = replace(MACHINE, rates=())


@given(
    free=st.integers(0, 1 << 42), step=st.integers(0, 8 * GIB), alone=st.booleans(),
    rate=st.floats(1e9, 1e12), seconds=st.floats(0.1, 10),
)  # fmt: skip
def test_a_pool_never_takes_more_than_there_is_or_can_be_read(
    free: int, step: int, alone: bool, rate: float, seconds: float
) -> None:
    machine = replace(MACHINE, memory=MemoryHeadroom(free, "x"), rates=(MemoryRate(4, rate),))
    pool = size(machine, Wishes(step, seconds, alone)).pool_gib * GIB
    assert 0 <= pool <= max(free - step - PROCESS_BYTES, 0)
    assert pool <= rate * seconds
    if not alone:
        assert pool <= 0.8 * free
    larger = replace(machine, memory=MemoryHeadroom(free + GIB, "x"))
    assert size(larger, Wishes(step, seconds, alone)).pool_gib * GIB >= pool


def test_bandwidth_bounds_the_pool_and_says_so() -> None:
    slow = replace(MACHINE, rates=(MemoryRate(4, 10e9),))
    sized = size(slow, Wishes(token_seconds=1.0))
    assert sized.pool_gib == 9.25  # 10e9 bytes, in whole quarters
    assert "10 GB/s" in sized.limited_by
    assert size(UNMEASURED, Wishes(token_seconds=1.0)).pool_gib > sized.pool_gib


@pytest.mark.parametrize(
    ("rates", "threads"),
    [
        ({1: 10, 2: 20, 4: 40, 6: 50, 7: 50, 8: 38}, 0),  # as the service would choose itself
        ({1: 10, 2: 20, 4: 49.9, 6: 50, 8: 38}, 0),  # no fewer without need: it is its own rule
        ({1: 10, 2: 20, 4: 30, 6: 40, 7: 48, 8: 50}, 8),
        ({1: 10, 2: 30, 4: 30, 6: 20, 8: 10}, 2),
        ({}, 0),
    ],
)
def test_threads_follow_the_measured_curve(rates: dict[int, float], threads: int) -> None:
    measured = tuple(MemoryRate(count, 1e9 * rate) for count, rate in rates.items())
    assert size(replace(MACHINE, rates=measured), Wishes()).threads == threads


@given(cpus=st.integers(1, 512))
def test_thread_counts_cover_the_range(cpus: int) -> None:
    counts = thread_counts(cpus)
    assert counts[0] == 1
    assert counts[-1] == cpus
    assert len(counts) <= 13
    assert list(counts) == sorted(set(counts))


def test_a_quota_bounds_what_is_measured() -> None:
    asked: list[tuple[int, int]] = []

    def reader(threads: int, cpus: tuple[int, ...]) -> float:
        asked.append((threads, len(cpus)))
        return 1e9 * threads

    measured = with_rates(replace(UNMEASURED, quota=2.5), reader)
    assert asked == [(1, 1), (2, 2)]
    assert [rate.bytes_per_second for rate in measured.rates] == [1e9, 2e9]


def test_the_memory_of_this_machine_is_read() -> None:
    small = replace(UNMEASURED, cpus=(0,), memory=MemoryHeadroom(64 << 20, "x"))
    (rate,) = with_rates(small).rates
    assert 1e8 < rate.bytes_per_second < 1e12
