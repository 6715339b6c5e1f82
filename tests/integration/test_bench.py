"""`neo bench` against the real services: its counts are theirs, and it ends as it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.stack import REPO, Stack, free_port, running_stack

SECONDS = 120.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("bench")
    with running_stack(
        directory, "smollm2", dtype="auto", metrics_port=free_port(), max_running_requests=4
    ) as running:
        yield running


def command(stack: Stack, *words: str) -> list[str]:
    return [
        sys.executable, "-m", "neo_client.cli", "bench", "--address", stack.router.address,
        "--admin-address", stack.gpu.address, *words,
    ]  # fmt: skip


def bench(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(stack, *words), cwd=REPO, capture_output=True, text=True, timeout=SECONDS
    )


def test_figures_agree_with_the_servers_own_metrics(stack: Stack, tmp_path: Path) -> None:
    """Within 2%: what this test sends queues for a while, so that the way to the server and back
    does not count. Nobody else uses these servers."""
    path, page = tmp_path / "a.json", tmp_path / "a.html"
    done = bench(
        stack, "--rate", "200", "--requests", "16", "--workload", "48x12", "--warmup", "3",
        "--metrics-url", f"http://127.0.0.1:{stack.gpu.config['metrics_port']}/metrics",
        "--json", str(path), "--html", str(page), "--target", "ttft=1e9", "--cores", "2",
        "--fail-if", "goodput_share<1", "--fail-if", "failed>0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(path.read_text())
    rows = {row["what"]: row for row in result["server"]["agreement"]}
    for exact in ("requests", "first_tokens", "prompt_tokens", "output_tokens"):
        assert rows[exact]["client"] == rows[exact]["server"] > 0
    assert rows["requests"]["client"] == 16
    for seconds in ("ttft_seconds", "e2e_seconds"):
        assert rows[seconds]["client"] == pytest.approx(rows[seconds]["server"], rel=0.02)
        # We are the ones who are farther away.
        assert rows[seconds]["client"] > rows[seconds]["server"]
    assert "server counts otherwise" not in done.stdout
    _check(result)
    assert page.read_text().startswith("<!doctype html>")


def _check(result: dict[str, Any]) -> None:
    """Sums of the file are those of its rows."""
    assert result["server"]["engine"]["device"] == "cpu"
    rows = [dict(zip(result["columns"], row, strict=True)) for row in result["requests"]]
    counted = [row for row in rows if not row["warmup"]]
    rates = result["figures"]["rates"]
    assert (len(rows), len(counted), rates["requests"]) == (16, 13, 13)
    assert rates["output_tokens"] == sum(row["tokens"] for row in counted)
    seconds = max(row["end"] for row in counted) - min(row["due"] for row in counted)
    assert rates["seconds"] == pytest.approx(seconds, abs=1e-3)
    per_core = result["figures"]["efficiency"]["tokens_per_core_second"]
    assert per_core == pytest.approx(rates["output_tokens_per_second"] / 2, rel=1e-3)
    ttft = sorted(1e3 * (row["first"] - row["due"]) for row in counted)
    latencies = result["figures"]["latencies_ms"]
    assert latencies["ttft"]["p50"] == pytest.approx(ttft[6], abs=0.02)
    assert latencies["ttft"]["max"] == pytest.approx(ttft[-1], abs=0.02)
    assert latencies["sent_ttft"]["p50"] >= latencies["server_ttft"]["p50"]


def test_a_condition_that_holds_fails_the_command(stack: Stack) -> None:
    words = ("--requests", "2", "--workload", "8x3", "--concurrency", "2")
    done = bench(stack, *words, "--fail-if", "ttft_p50_ms>0", "--quiet")
    assert done.returncode == 3
    assert "failed: ttft_p50_ms>0" in done.stderr
    assert "2 requests" in done.stdout


def test_turns_are_continued_by_what_the_server_said(stack: Stack, tmp_path: Path) -> None:
    path = tmp_path / "turns.json"
    done = bench(
        stack, "--requests", "2", "--turns", "3", "--workload", "16x3", "--shared-prefix", "20",
        "--concurrency", "2", "--json", str(path), "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    rows = [dict(zip(result["columns"], row, strict=True)) for row in result["requests"]]
    for session in (0, 1):
        first, second, third = (row for row in rows if row["session"] == session)
        new = first["prompt_tokens"] - 20
        assert second["prompt_tokens"] == first["prompt_tokens"] + first["tokens"] + new
        assert third["prompt_tokens"] == second["prompt_tokens"] + second["tokens"] + new


def test_requests_that_cannot_be(stack: Stack) -> None:
    done = bench(stack, "--requests", "3", "--workload", "100000x10", "--quiet")
    assert done.returncode == 2
    assert "3 of 3 requests are longer" in done.stderr
    assert bench(stack, "--rate", "-1").returncode == 2
    assert bench(stack, "--fail-if", "speed>3").returncode == 2
    assert bench(stack, "--prompts", "none.jsonl").returncode == 2


def test_an_interrupted_run_reports_what_had_ended(stack: Stack, tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    words = ("--workload", "8x2", "--concurrency", "1", "--duration", "600", "--json", str(path))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command(stack, *words), cwd=REPO, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        shown = process.stderr.readline()  # progress: requests are under way
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert "ended" in shown
    assert process.returncode == 130
    assert "interrupted" in out
    result = json.loads(path.read_text())
    assert result["interrupted"]
    assert result["figures"]["rates"]["failed"] == 0
    assert len(result["requests"]) > 0


def test_nobody_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "neo_client.cli", "bench", "--address",
         f"127.0.0.1:{free_port()}", "--requests", "1"],
        cwd=REPO, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
