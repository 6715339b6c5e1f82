"""A cpu_service for benchmarks that run the engine in their own process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from benchmarks.stack import free_port, running

START_SECONDS = 60.0


@contextmanager
def cpu_service(threads: int = 0) -> Iterator[str]:
    """Yields its address. `threads`: of its attention; 0 takes all allowed cores but two."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="neo-host-") as folder:
        command = [sys.executable, "-m", "cpu_service", "--listen", address]
        command += ["--runtime-dir", folder, "--threads", str(threads)]
        log_path = Path(folder) / "log"
        with running(command, log_path) as process:
            _wait_serving(address, process, log_path)
            yield address


def _wait_serving(address: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with grpc.insecure_channel(address) as channel:
        ready = grpc.channel_ready_future(channel)
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise SystemExit(f"the cpu_service ended:\n{log_path.read_text()}")
            try:
                ready.result(timeout=1)
                return
            except grpc.FutureTimeoutError:
                continue
    raise SystemExit(f"the cpu_service did not answer:\n{log_path.read_text()}")
