"""What a cpu_service grants: memory, threads, configuration."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace

import pytest

from cpu_service.affinity import plan_threads
from cpu_service.config import CpuServiceConfig
from cpu_service.epoch import EpochStats
from cpu_service.pool import PoolBudget, allocate_pool
from neo_common.errors import Reason, ServiceError
from neo_common.shm.limits import MemoryHeadroom


def budget(free: int, max_bytes: int = 0) -> PoolBudget:
    return PoolBudget(max_bytes, lambda: MemoryHeadroom(free, "the test"))


def test_a_pool_takes_what_is_there_and_gives_it_back() -> None:
    it = budget(free=1000, max_bytes=600)
    it.take(500, 100)
    assert it.used_bytes == 500
    assert it.available().bytes == 100
    it.give_back(500)
    assert it.available() == MemoryHeadroom(600, "max_pool_gib")


@pytest.mark.parametrize(
    ("free", "limit", "pool", "other", "source"),
    [
        (1000, 0, 900, 101, "the test"),
        (1000, 600, 500, 101, "max_pool_gib"),
        (10, 0, 11, 0, "the test"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused_with_what_limits_it(
    free: int, limit: int, pool: int, other: int, source: str
) -> None:
    it = budget(free, limit)
    with pytest.raises(ServiceError, match=source) as caught:
        it.take(pool, other)
    assert caught.value.reason is Reason.OUT_OF_HOST_MEMORY
    assert caught.value.field == "host_blocks"
    assert it.used_bytes == 0


def test_memory_that_exists_counts_against_the_configured_limit_only() -> None:
    it = budget(free=0)
    it.take(500, 100, exists=True)
    assert it.used_bytes == 500
    with pytest.raises(ServiceError, match="max_pool_gib"):
        budget(free=0, max_bytes=600).take(700, 0, exists=True)


@pytest.mark.parametrize(("threads", "cpus"), [(1, ()), (2, (0,)), (3, ())])
def test_an_allocated_pool_is_zeroed_and_resident(threads: int, cpus: tuple[int, ...]) -> None:
    size = 3 * mmap.PAGESIZE + 5
    before = os.sched_getaffinity(0)
    with allocate_pool(size, threads, cpus) as memory:
        assert memory.buffer[:] == bytes(memory.size)
    assert os.sched_getaffinity(0) == before, "only the helper threads are pinned"


def test_an_absurd_pool_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        allocate_pool(1 << 62, 1, ())


def test_threads_follow_the_configuration() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert plan_threads(CpuServiceConfig(threads=3)).threads == 3
    assert plan_threads(CpuServiceConfig(threads=3)).cpus == ()
    pinned = plan_threads(CpuServiceConfig(cpus=(allowed[0],)))
    assert (pinned.threads, pinned.cpus) == (1, (allowed[0],))
    default = plan_threads(CpuServiceConfig())
    assert 1 <= default.threads <= (len(allowed) - 2 if len(allowed) >= 4 else len(allowed))
    with pytest.raises(ValueError, match="CPU 9999"):
        plan_threads(CpuServiceConfig(cpus=(9999,)))


@pytest.mark.parametrize(
    ("cores", "threads", "spin_us"), [(1, 1, 20), (2, 2, 20), (3, 3, 20), (4, 2, 1000)]
)
def test_few_cores_are_shared_with_the_engine(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, spin_us: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    plan = plan_threads(CpuServiceConfig())
    assert (plan.threads, plan.spin_us) == (threads, spin_us)
    assert bool(plan.cpus) == (cores >= 4)
    assert plan_threads(CpuServiceConfig(spin_us=7)).spin_us == 7


@pytest.mark.parametrize(
    "field",
    ["threads", "max_pool_gib", "drain_grace_seconds", "max_sessions", "max_rows", "spin_us"],
)
def test_configuration_is_checked(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        CpuServiceConfig(**{field: -2}).validate()  # type: ignore[arg-type]
    CpuServiceConfig().validate()


def test_more_threads_than_cpus_is_refused() -> None:
    with pytest.raises(ValueError, match="threads"):
        CpuServiceConfig(threads=2, cpus=(0,)).validate()
    with pytest.raises(ValueError, match="cpus"):
        CpuServiceConfig(cpus=(-1,)).validate()


def test_epoch_counters_add_up() -> None:
    assert EpochStats(1, 2, 3, 0.5) + EpochStats(1, 1, 1, 0.25) == EpochStats(2, 3, 4, 0.75)
    one = replace(EpochStats(backlog=2), layers=(1, *EpochStats().layers[1:]))
    assert (one + one).layers[:2] == (2, 0)
    assert one.ended() == replace(one, backlog=0)
