"""`neo bench` from its flags to its result, on a server without an engine."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from neo_client import cli
from neo_client.commands.bench import Bench, finish
from neo_common.errors import Reason, ServiceError
from tests.support.fake_backend import FakeBackend, fake_backends


def arguments(backend: FakeBackend, tmp_path: Path, *words: str) -> Any:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "secret words", "max_tokens": 3}))
    return cli.parser().parse_args(
        ["bench", "--address", backend.address, "--prompts", str(prompts), "--quiet",
         "--json", str(tmp_path / "run.json"), *words]
    )  # fmt: skip


@contextmanager
def metrics_page(pages: list[str | None]) -> Iterator[str]:
    """Answers with one page after the other; None is an error."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.pop(0)
            self.send_response(500 if page is None else 200)
            self.end_headers()
            self.wfile.write((page or "").encode())

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
        finally:
            server.shutdown()
            thread.join()


PAGE = (
    'vllm:generation_tokens_total{{model_name="m"}} {tokens}\n'
    'vllm:prompt_tokens_total{{model_name="m"}} {tokens}\n'
)


async def test_a_run_and_what_it_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages: list[str | None] = [PAGE.format(tokens=7), PAGE.format(tokens=19)]
    async with fake_backends(1) as (backend,):
        with metrics_page(pages) as url:
            given = arguments(
                backend, tmp_path, "--requests", "4", "--concurrency", "2", "--metrics-url", url,
                "--placement", "gpu-only", "--html", str(tmp_path / "run.html"),
            )  # fmt: skip
            result = await Bench(given).run()
    assert finish(given, result, []) == 0
    rows = {row["what"]: row for row in result["server"]["agreement"]}
    assert (rows["output_tokens"]["client"], rows["output_tokens"]["server"]) == (12, 12)
    assert rows["prompt_tokens"]["difference_percent"] == pytest.approx(100 * (20 / 12 - 1), abs=1)
    assert len(backend.requests) == 4
    assert all(r.scheduling.placement and r.sampling.ignore_eos for r in backend.requests)
    assert "server counts otherwise: prompt_tokens" in capsys.readouterr().out
    for left in ("run.json", "run.html"):
        assert "secret" not in (tmp_path / left).read_text()


async def test_a_server_that_stops_to_say_what_it_counted_costs_no_result(tmp_path: Path) -> None:
    async with fake_backends(1) as (backend,):
        with metrics_page([PAGE.format(tokens=7), None]) as url:
            given = arguments(backend, tmp_path, "--requests", "2", "--metrics-url", url)
            result = await Bench(given).run()
    assert "agreement" not in result["server"]
    assert "500" in result["server"]["agreement_problem"]
    assert finish(given, result, []) == 0


async def test_every_request_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = ServiceError(Reason.QUEUE_FULL, "full")
    async with fake_backends(1, fail_with=refusal) as (backend,):
        given = arguments(backend, tmp_path, "--requests", "3", "--rate", "100")
        result = await Bench(given).run()
    # Each was sent once: a retry would hide that it failed.
    assert len(backend.requests) == 3
    assert finish(given, result, []) == 1
    assert "3 failed: RESOURCE_EXHAUSTED QUEUE_FULL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--requests", "2", "--warmup", "2"), "warmup"),
        (("--requests", "2", "--metrics-url", "ftp://x"), "metrics-url"),
        (("--requests", "2", "--metrics-url", "http://127.0.0.1:1/"), "metrics-url"),
        (("--machine", "a"), "prices"),
        (("--prices", "a.yaml"), "machine"),
    ],
)
async def test_what_cannot_be(tmp_path: Path, words: tuple[str, ...], problem: str) -> None:
    async with fake_backends(1) as (backend,):
        given = arguments(backend, tmp_path, *words)
        with pytest.raises(ValueError, match=problem):
            await Bench(given).run()
    assert backend.requests == []


def test_flags_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--target", "speed=3"], ["--target", "ttft=0"], ["--ramp", "1"], ["--shared-prefix", "x"],
        ["--rate", "1", "--trace", "a"],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            cli.parser().parse_args(["bench", *words])
    for words in (["--concurrency", "0"], ["--timeout", "0"], ["--seed", "-1"],
                  ["--json", "/none/such/a.json"]):  # fmt: skip
        assert cli.main(["bench", *words]) == 2
        assert words[0].removeprefix("--") in capsys.readouterr().err or words[0] == "--json"


def test_files_that_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"schema": "other"}')
    for command in (["compare", str(path), str(path)], ["report", str(path), "--html", "x.html"]):
        assert cli.main(["bench", *command]) == 2
        assert "not a result of neo bench" in capsys.readouterr().err


async def test_runs_are_compared_and_changes_can_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, delay in (("quick", 0.0), ("slow", 0.05)):
        async with fake_backends(1, delay=delay) as (backend,):
            given = arguments(backend, tmp_path, "--requests", "30", "--concurrency", "10")
            given.json = tmp_path / f"{name}.json"
            assert finish(given, await Bench(given).run(), []) == 0
        paths.append(str(given.json))
    capsys.readouterr()
    page = tmp_path / "both.html"
    words = ["bench", "compare", *paths, "--html", str(page)]
    assert cli.main(words) == 0
    assert "worse" in capsys.readouterr().out
    assert "slow against quick" in page.read_text()
    assert cli.main([*words, "--fail-if", "e2e_p50_ms>+20%"]) == 3
    assert "slow: e2e_p50_ms>+20%" in capsys.readouterr().err
    assert cli.main(["bench", "report", paths[0], "--html", str(page)]) == 0
