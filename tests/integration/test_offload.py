"""Host tier and cpu_service as real processes: results, sessions, leaks, idleness."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_service.offload.host_tier import HostRows, HostTierState
from gpu_service.offload.keeper import HostTierUnavailable
from kernels.cpu import DType
from tests.support.offload import (
    BLOCKS,
    SHAPE,
    TRANSPORTS,
    Mirror,
    cpu_seconds,
    cpu_service,
    open_descriptors,
    open_tier,
    resident_bytes,
)
from tests.support.stack import REPO, Service, free_port


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with cpu_service(tmp_path_factory.mktemp("cpu")) as running:
        yield running


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kv_dtype", [DType.BFLOAT16, DType.INT8])
def test_results_are_those_of_the_kernel(service: Service, transport: str, kv_dtype: DType) -> None:
    shape = dataclasses.replace(SHAPE, kv_dtype=kv_dtype)
    mirror = Mirror.make(shape=shape)
    with open_tier(service.address, transport, shape) as tier:
        assert tier.state is HostTierState.UP
        assert tier.blocks == BLOCKS
        mirror.fill(tier)
        mirror.check_contents(tier)
        for lengths in ([1], [16, 17, 95], [15, 96, 2, 40, 31]):
            mirror.sweep(tier, mirror.rows(lengths))
        mirror.sweep(tier, mirror.rows([33, 5]), mirror.rows([96]))
        mirror.check_contents(tier)  # the appended tokens too


def test_the_comparison_can_fail(service: Service) -> None:
    """Another scale, or KV that the mirror does not have, must show."""
    mirror = Mirror.make()
    with open_tier(service.address, shape=dataclasses.replace(SHAPE, scale=0.21)) as tier:
        mirror.fill(tier)
        with pytest.raises(AssertionError):
            mirror.sweep(tier, mirror.rows([40]))
    with open_tier(service.address) as tier:
        with pytest.raises(AssertionError):
            mirror.check_contents(tier)
        with pytest.raises(AssertionError):
            mirror.sweep(tier, mirror.rows([40]))


def test_two_sessions_do_not_see_each_other(tmp_path: Path) -> None:
    first, second = Mirror.make(1), Mirror.make(2)
    with (
        cpu_service(tmp_path, max_sessions=2) as running,
        open_tier(running.address) as one,
        open_tier(running.address, "grpc") as two,
    ):
        first.fill(one)
        second.fill(two)
        for _ in range(3):
            first.sweep(one, first.rows([30, 60]))
            second.sweep(two, second.rows([96]))
        first.check_contents(one)
        second.check_contents(two)
        with pytest.raises(HostTierUnavailable, match="max_sessions"):
            open_tier(running.address).__enter__()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_cancelled_sweep_leaves_a_whole_tier(service: Service, transport: str) -> None:
    mirror = Mirror.make()
    with open_tier(service.address, transport) as tier:
        mirror.fill(tier)
        rows = mirror.rows([30])
        inputs = [mirror.normal(1, heads, 32) for heads in (6, 2, 2)]
        tier.begin_sweep([rows])
        tier.submit(0, 0, *inputs)
        tier.cancel_sweep()
        mirror.attend(0, rows, *inputs)  # layer 0's token was stored, or will be again
        mirror.sweep(tier, rows)
        tier.cancel_sweep()
        mirror.sweep(tier, mirror.rows([7, 8]))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("length", "block"), [(97, 0), (0, 0), (5, BLOCKS), (5, -1)])
def test_rows_that_do_not_fit_are_refused_here(
    service: Service, transport: str, length: int, block: int
) -> None:
    with open_tier(service.address, transport) as tier:
        bad = HostRows(np.array([length], np.int32), np.full((1, 6), block, np.int32))
        with pytest.raises(ValueError, match=r"length|block id"):
            tier.begin_sweep([bad])
        assert tier.state is HostTierState.UP


def test_empty_reads_and_writes(service: Service) -> None:
    for transport in TRANSPORTS:
        with open_tier(service.address, transport) as tier:
            none = torch.empty((0, 2, 32), dtype=torch.bfloat16)
            tier.write_kv(0, torch.empty(0, dtype=torch.int64), none, none)
            k, v = tier.read_kv(0, torch.empty(0, dtype=torch.int64))
            assert k.shape == v.shape == (0, 2, 32)


def test_stats_arrive_with_heartbeats(service: Service) -> None:
    mirror = Mirror.make()
    with open_tier(service.address, lease_seconds=1.0) as tier:
        mirror.fill(tier)
        for _ in range(3):
            mirror.sweep(tier, mirror.rows([30]))
        deadline = time.monotonic() + 5
        while tier.stats.rows < 9 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert tier.stats.rows == 9
        assert tier.stats.kv_bytes_read > 0
        assert tier.stats.busy_seconds > 0


def test_fifty_sessions_leak_nothing(service: Service) -> None:
    """Descriptors and memory, on both sides."""
    assert service.process is not None
    pids = (os.getpid(), service.process.pid)
    mirror = Mirror.make()

    for transport in TRANSPORTS:
        for _ in range(5):
            with open_tier(service.address, transport) as tier:
                mirror.fill(tier)
        gc.collect()
        before = [(open_descriptors(pid), resident_bytes(pid)) for pid in pids]
        for _ in range(25):
            with open_tier(service.address, transport) as tier:
                tier.begin_sweep([mirror.rows([20])])
                tier.cancel_sweep()
        gc.collect()
        for pid, (descriptors, resident) in zip(pids, before, strict=True):
            assert open_descriptors(pid) <= descriptors + 2
            assert resident_bytes(pid) - resident < 8 << 20


def test_metrics_tell_what_was_done(tmp_path: Path) -> None:
    mirror, port = Mirror.make(), free_port()
    with cpu_service(tmp_path, metrics_port=port) as running, open_tier(running.address) as tier:
        mirror.fill(tier)
        mirror.sweep(tier, mirror.rows([20, 30]))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values["neo_host_sessions"]) == 1
    assert float(values["neo_host_pool_bytes"]) == SHAPE.layout.pool_bytes(BLOCKS)
    assert float(values["neo_host_rows_total"]) == 2 * SHAPE.layers
    assert float(values["neo_host_kv_read_bytes_total"]) > 0
    assert float(values["neo_host_backlog_layers"]) == 0
    assert float(values["neo_host_attention_seconds_count"]) == SHAPE.layers
    assert float(values['neo_host_attention_seconds_bucket{le="+Inf"}']) == SHAPE.layers
    assert float(values["neo_host_attention_seconds_sum"]) > 0
    assert float(values["neo_host_up_seconds_total"]) > 0


def test_the_service_does_not_import_torch() -> None:
    code = "import sys, cpu_service.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


def test_an_idle_service_uses_no_cpu(service: Service) -> None:
    assert service.process is not None
    mirror = Mirror.make()
    with open_tier(service.address) as tier:
        mirror.fill(tier)
        mirror.sweep(tier, mirror.rows([20]))
        time.sleep(0.2)
        before = cpu_seconds(service.process.pid)
        time.sleep(1.5)
        assert cpu_seconds(service.process.pid) - before <= 0.03
