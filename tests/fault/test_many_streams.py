"""Ten thousand streams on one router that nothing comes on: what they hold, and what stays."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.stack import Service, free_port

REPO = Path(__file__).resolve().parents[2]
CLIENTS, CONNECTIONS, STREAMS = 4, 250, 10
TOTAL = CLIENTS * CONNECTIONS * STREAMS
KIB_PER_STREAM = 100
"""With its share of a connection; docs/operations.md says about 55 for a stream alone."""


@contextmanager
def engine() -> Iterator[str]:
    """One message on each stream, and then none for hours."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "benchmarks.router.engine", "--listen", address]
    process = subprocess.Popen([*command, "--step-ms", "1e7"], cwd=REPO)
    try:
        yield address
    finally:
        process.kill()
        process.wait(timeout=30)


def round_of_streams(router: Service, process: psutil.Process) -> tuple[float, float]:
    """Opens all and lets go of all; MiB of the router with them, at once and after a while."""
    command = [sys.executable, "-m", "tests.support.idle_streams", router.address]
    clients = [
        subprocess.Popen(
            [*command, str(CONNECTIONS), str(STREAMS)],
            cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(CLIENTS)
    ]  # fmt: skip
    try:
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == "open\n"
        begun = process.memory_info().rss / 2**20
        time.sleep(20)
        later = process.memory_info().rss / 2**20
        assert all(client.poll() is None for client in clients)
    finally:
        for client in clients:
            client.kill()
            client.wait(timeout=60)
    return begun, later


def until_closed(process: psutil.Process, fds: int, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while process.num_fds() > fds:
        assert time.monotonic() < deadline, f"{process.num_fds()} descriptors, {fds} before"
        time.sleep(0.2)  # another process's: there is nothing to wait on


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_idle_streams_hold_little_and_leave_nothing(tmp_path: Path) -> None:
    with engine() as backend:
        listen = f"127.0.0.1:{free_port()}"
        config: dict[str, object] = {
            "listen": listen, "backends": [backend], "max_calls": 2 * TOTAL,
            # The engine shares the machine with all these clients, and may be late.
            "stale_seconds": 60.0, "silence_seconds": 120.0,
        }  # fmt: skip
        router = Service("router", listen, config, tmp_path)
        router.start()
        try:
            router.wait_serving()
            assert router.process is not None
            process = psutil.Process(router.process.pid)
            idle, fds = process.memory_info().rss / 2**20, process.num_fds()
            begun, later = round_of_streams(router, process)
            until_closed(process, fds + 4)
            again, _ = round_of_streams(router, process)
            until_closed(process, fds + 4)
        finally:
            router.stop()
    each = (begun - idle) * 1024 / TOTAL
    print(
        f"{idle:.0f} MiB idle, {begun:.0f} with {TOTAL}, {later:.0f} after 20 s, {again:.0f} again"
    )
    assert each < KIB_PER_STREAM
    assert later - begun < 0.05 * (begun - idle)
    assert again - idle < 1.15 * (begun - idle)
