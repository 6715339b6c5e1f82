"""Thread counts respect cpusets and CFS quotas."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kernels.cpu import default_cpus, default_threads
from kernels.cpu.placement import quota_cpus


@pytest.fixture
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


@pytest.mark.parametrize(
    ("cpu_max", "threads"),
    [("max 100000", 14), ("400000 100000", 4), ("50000 100000", 1), ("nonsense", 14), (None, 14)],
)
@pytest.mark.usefixtures("sixteen_cpus")
def test_quota_caps_threads(tmp_path: Path, cpu_max: str | None, threads: int) -> None:
    if cpu_max is not None:
        (tmp_path / "cpu.max").write_text(cpu_max)
    assert default_threads(tmp_path) == threads
    assert default_cpus(tmp_path) == tuple(range(16 - threads, 16))


def test_the_oldest_interface_counts_too(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert quota_cpus(tmp_path) == 2.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert quota_cpus(tmp_path) is None


def test_two_cpus_leave_one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert (default_threads(tmp_path), default_cpus(tmp_path)) == (1, (5,))
