"""A real Prometheus scrapes a loaded system: every query of the dashboards and alerts has data."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from deploy.observability.alerts import ALERTS
from deploy.observability.generate import HERE
from protos.neo.v1 import types_pb2
from tests.support.load import Job, random_jobs, run_jobs
from tests.support.prometheus import Prometheus, prometheus
from tests.support.stack import Stack, free_port, running_stack, stack_model

RULES = HERE / "alerts" / "neo.rules.yaml"


@dataclass
class Loaded:
    stack: Stack
    prometheus: Prometheus


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """All three services after requests on both tiers, migrations, and one refusal."""
    directory = tmp_path_factory.mktemp("observed")
    ports = {name: free_port() for name in ("cpu_service", "gpu_service", "router")}
    more = {name: {"metrics_port": port} for name, port in ports.items()}
    model = stack_model(directory)
    settings = {"gpu_kv_blocks": 40, "force_migration_every": 7, "max_batch_tokens": 64}
    with (
        running_stack(directory, model, more=more, **settings) as stack,
        prometheus(directory, ports, RULES) as scraper,
    ):
        scraper.wait_for("sum(up) == 3 and sum(vllm:num_requests_running) == 0")
        jobs = random_jobs(32, seed=5)
        jobs.append(Job(tuple(range(3, 90)), 30, placement=types_pb2.PLACEMENT_CPU_PREFERRED))
        answers = asyncio.run(run_jobs(stack.router.address, jobs))
        assert all(answer.error is None for answer in answers)
        no_token = Job((10_000_000,), 1)
        (refused,) = asyncio.run(run_jobs(stack.router.address, [no_token]))
        assert refused.error is not None
        tokens = sum(job.output_tokens for job in jobs)
        scraper.wait_for(f"sum(vllm:generation_tokens_total) == {tokens}")
        scraper.wait_for('neo_request_errors_total{reason="INVALID_ARGUMENT"} == 1')
        yield Loaded(stack, scraper)


def filled_in(expression: str) -> str:
    """As Grafana asks, with everything selected."""
    expression = expression.replace("$__rate_interval", "1m")
    return re.sub(r"\$(model|instance)", ".*", expression)


def panels() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted((HERE / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                found.setdefault(f"{path.stem}/{panel['title']}", []).append(target["expr"])
    return found


def test_every_query_of_the_dashboards_has_data(loaded: Loaded) -> None:
    empty = [
        (panel, expression)
        for panel, expressions in panels().items()
        for expression in expressions
        if not any(map(math.isfinite, loaded.prometheus.values(filled_in(expression))))
    ]
    assert not empty


def test_every_variable_of_the_dashboards_has_values(loaded: Loaded) -> None:
    for path in sorted((HERE / "dashboards").glob("*.json")):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] != "query":
                continue
            found = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["definition"])
            assert found, variable
            metric, label = found.groups()
            assert loaded.prometheus.get(f"label/{label}/values", **{"match[]": metric}), variable


def test_every_alert_looks_at_something(loaded: Loaded) -> None:
    """What an alert compares has data; those that have none while all is well say why."""
    empty = {alert.name for alert in ALERTS if not loaded.prometheus.values(alert.value)}
    assert empty <= {alert.name for alert in ALERTS if alert.silent}
    for alert in ALERTS:
        assert not alert.silent or alert.name in empty, f"{alert.name} is not silent"


def test_prometheus_has_evaluated_the_rules(loaded: Loaded) -> None:
    (group,) = loaded.prometheus.get("rules")["groups"]
    rules = {rule["name"]: rule for rule in group["rules"]}
    assert rules.keys() == {alert.name for alert in ALERTS}
    assert all(not rule.get("lastError") for rule in rules.values())
    assert all(rule["state"] == "inactive" for rule in rules.values()), rules
