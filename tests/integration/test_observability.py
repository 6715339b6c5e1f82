"""A real Prometheus scrapes a loaded system: every query of the dashboards and alerts has data."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from deploy.observability.alerts import ALERTS
from deploy.observability.generate import HERE
from neo_client import Client, Sampling, Scheduling
from protos.neo.v1 import types_pb2
from tests.support.collector import Collector, Seen, collector
from tests.support.load import Job, random_jobs, run_jobs
from tests.support.prometheus import Prometheus, prometheus
from tests.support.stack import REPO, Stack, free_port, running_stack, stack_model

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
RULES = HERE / "alerts" / "neo.rules.yaml"


@dataclass
class Loaded:
    stack: Stack
    prometheus: Prometheus
    spans: Collector


def traced(settings: dict[str, Any], spans: Collector) -> dict[str, Any]:
    """Nothing is traced but what its caller traces."""
    tracing = {"trace_endpoint": spans.endpoint, "trace_sample_ratio": 0.0}
    return {name: of if name == "cpu_service" else of | tracing for name, of in settings.items()}


def generate_traced(address: str) -> int:
    """One request within a span of its client, on the host tier and to and fro; its tokens."""
    parent = SpanContext(int(TRACE, 16), int(PARENT, 16), False, TraceFlags(TraceFlags.SAMPLED))
    with use_span(NonRecordingSpan(parent)), Client(address) as client:
        client.generate(
            list(range(3, 90)), sampling=Sampling(max_tokens=40, temperature=0, ignore_eos=True),
            scheduling=Scheduling(placement="cpu-preferred"), token_ids_only=True,
        )  # fmt: skip
    return 40


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """All three services after requests on both tiers, migrations, one refusal, and one request
    with a trace."""
    directory = tmp_path_factory.mktemp("observed")
    ports = {name: free_port() for name in ("cpu_service", "gpu_service", "router")}
    more = {name: {"metrics_port": port} for name, port in ports.items()}
    model = stack_model(directory)
    settings = {
        "gpu_kv_blocks": 40, "force_migration_every": 7, "max_batch_tokens": 64,
        "offload_mode": "auto", "profile_dir": "none",
    }  # fmt: skip
    with (
        collector() as spans,
        running_stack(directory, model, more=traced(more, spans), **settings) as stack,
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
        tokens = sum(job.output_tokens for job in jobs) + generate_traced(stack.router.address)
        scraper.wait_for(f"sum(vllm:generation_tokens_total) == {tokens}")
        scraper.wait_for('neo_request_errors_total{reason="INVALID_ARGUMENT"} == 1')
        yield Loaded(stack, scraper, spans)


def filled_in(expression: str) -> str:
    """As Grafana asks of a long view, with everything selected: a slow machine takes minutes from
    the first call's first message to the last query."""
    expression = expression.replace("$__rate_interval", "30m")
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
    # Pending is what a busy machine may make of latencies and predictions.
    assert not [name for name, rule in rules.items() if rule["state"] == "firing"]


def test_a_trace_leads_from_the_client_to_the_sweeps(loaded: Loaded) -> None:
    def complete(spans: list[Seen]) -> bool:
        return {"route Generate", "generate", "sweep"} <= {span.name for span in spans}

    spans = loaded.spans.wait_for(complete)
    assert {span.trace_id for span in spans} == {TRACE}
    (route,) = [span for span in spans if span.name == "route Generate"]
    (generate,) = [span for span in spans if span.name == "generate"]
    assert (route.service, route.parent_id) == ("neo-router", PARENT)
    assert route.events == [("attempt", {"backend": loaded.stack.gpu.address})]
    assert (generate.service, generate.parent_id) == ("neo-gpu-service", route.span_id)
    parts = [span for span in spans if span.parent_id == generate.span_id]
    assert len(parts) == len(spans) - 2
    for part in parts:
        assert generate.start_ns - 50e6 <= part.start_ns <= part.end_ns <= generate.end_ns + 50e6
    by_name: dict[str, list[Seen]] = {}
    for part in parts:
        by_name.setdefault(part.name, []).append(part)
    assert by_name.keys() == {"queue", "prefill", "decode", "sweep", "move"}
    computed = sum(part.attributes["neo.tokens"] for part in by_name["prefill"])
    assert computed + generate.attributes["neo.cached_prompt_tokens"] == 87
    decoded: dict[str, int] = {}
    for part in by_name["decode"]:
        by = part.attributes["neo.by"]
        decoded[by] = decoded.get(by, 0) + part.attributes["neo.tokens"]
    # The first token comes from the prefill.
    assert sum(decoded.values()) == generate.attributes["gen_ai.usage.output_tokens"] - 1 == 39
    on_host = generate.attributes["neo.host_tokens"]
    assert on_host - 1 <= decoded.get("host", 0) <= on_host
    assert len(by_name["sweep"]) == 6  # 1, 2, 4, 8, 16, 32
    assert all(part.attributes["neo.host_wait_seconds"] >= 0 for part in by_name["sweep"])


def test_latencies_name_their_traces(loaded: Loaded) -> None:
    for histogram in ("vllm:e2e_request_latency_seconds", "neo_router_first_message_seconds"):
        answer = loaded.prometheus.get(
            "query_exemplars", query=f"{histogram}_bucket",
            start=str(time.time() - 600), end=str(time.time() + 60),
        )  # fmt: skip
        traces = {e["labels"]["trace_id"] for series in answer for e in series["exemplars"]}
        assert traces == {TRACE}, histogram


def test_every_metric_of_ours_is_described(loaded: Loaded) -> None:
    """In the tables; those of routers and machines, and the build's, are described in words."""
    text = (REPO / "docs" / "observability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `neo_")]
    described = {name for row in rows for name in re.findall(r"`(neo_\w+)`", row)}
    match = '{__name__=~"neo_.*", job=~"gpu_service|cpu_service"}'
    names = loaded.prometheus.get("label/__name__/values", **{"match[]": match})
    families = {
        re.sub(r"_(bucket|sum|count|created)$", "", name)
        for name in names
        if not name.startswith(("neo_machine_", "neo_build_"))
    }
    # A counter's time of birth is named like it, without its ending.
    born = {name.removesuffix("_total") for name in families if name.endswith("_total")}
    assert families - born <= described, families - born - described
    assert described <= families, described - families
