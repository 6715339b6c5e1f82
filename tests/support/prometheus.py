"""A real Prometheus that scrapes what a test runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.stack import free_port

SCRAPE_SECONDS = 0.5


def binary(name: str) -> str:
    """Where a program is that `make system-tools` installs."""
    found = shutil.which(name)
    assert found, f"{name} is not on this machine: run `make system-tools`"
    return found


@dataclass
class Prometheus:
    url: str
    log: Path

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its HTTP API."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                body = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def values(self, expression: str) -> list[float]:
        return [float(series["value"][1]) for series in self.query(expression)]

    def wait_for(self, expression: str, seconds: float = 60.0) -> list[float]:
        """Until the query has a series; its values."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := self.values(expression):
                return found
            time.sleep(SCRAPE_SECONDS / 2)
        raise AssertionError(f"nothing for {expression}:\n{self.log.read_text()[-2000:]}")


@contextmanager
def prometheus(directory: Path, targets: Mapping[str, int], rules: Path) -> Iterator[Prometheus]:
    """`targets`: job -> port on loopback."""
    port = free_port()
    config = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
            for job, target in targets.items()
        ],
    }
    config_path = directory / "prometheus.yaml"
    config_path.write_text(yaml.safe_dump(config))
    log = directory / "prometheus.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                binary("prometheus"), f"--config.file={config_path}",
                f"--storage.tsdb.path={directory / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage",
            ],
            stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    running = Prometheus(f"http://127.0.0.1:{port}", log)
    try:
        _wait_ready(running, process)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)


def _wait_ready(running: Prometheus, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, running.log.read_text()
        try:
            with urllib.request.urlopen(f"{running.url}/-/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(running.log.read_text())
