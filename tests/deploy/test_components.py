"""Components one by one, and the ones whose schemas nobody ships."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from router.admission.metrics import AdmissionMetrics
from router.metrics import RouterMetrics
from tests.support.deploy_checks import CHECKS
from tests.support.manifests import COMPONENTS, K8S, containers, named, overlay, with_components
from tests.unit.frontend.test_metrics import full_metrics

SCHEMAS_ELSEWHERE = {"ScaledObject", "PodMonitor", "PrometheusRule"}


@pytest.mark.parametrize("name", COMPONENTS)
def test_each_alone(name: str, tmp_path: Path) -> None:
    manifests = with_components(tmp_path, [name])
    for each in manifests:
        if each["kind"] not in SCHEMAS_ELSEWHERE:
            kubernetes_validate.validate(each, "1.37", strict=True)
    assert [problem for check in CHECKS for problem in check(manifests)] == []


def known_metrics() -> set[str]:
    """Names that a gpu_service and a router export."""
    router = CollectorRegistry()
    RouterMetrics(router)
    AdmissionMetrics(router)
    text = generate_latest(full_metrics().registry) + generate_latest(router)
    return set(re.findall(r"^([a-z_:]+)[{ ]", text.decode(), re.MULTILINE))


def test_scaling_asks_for_metrics_that_are_there() -> None:
    scaled = named(overlay("prod"), "ScaledObject", "neo-gpu")["spec"]
    rules = yaml.safe_load((K8S / "components/external-metrics/adapter-rules.yaml").read_text())
    queries = [trigger["metadata"]["query"] for trigger in scaled["triggers"]]
    queries += [rule["metricsQuery"] for rule in rules["externalRules"]]
    series = [
        name for query in queries for name in re.findall(r"(?:vllm|neo)[a-z_:]+(?=\{)", query)
    ]
    assert len(series) == len(queries) + 2 == 6  # the queue is a sum of two
    assert set(series) <= known_metrics()
    for rule in rules["externalRules"]:
        assert rule["seriesQuery"].partition("{")[0] in known_metrics()


def test_both_ways_to_scale_mean_the_same(tmp_path: Path) -> None:
    keda = named(overlay("prod"), "ScaledObject", "neo-gpu")["spec"]
    scaler = named(
        with_components(tmp_path, ["external-metrics"]), "HorizontalPodAutoscaler", "neo-gpu"
    )
    hpa = scaler["spec"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (
        hpa["minReplicas"],
        hpa["maxReplicas"],
    )
    thresholds = [float(trigger["metadata"]["threshold"]) for trigger in keda["triggers"]]
    targets = [metric["external"]["target"]["averageValue"] for metric in hpa["metrics"]]
    assert [float(t[:-1]) / 1000 if t.endswith("m") else float(t) for t in targets] == thresholds
    rules = yaml.safe_load((K8S / "components/external-metrics/adapter-rules.yaml").read_text())
    served = {rule["name"]["as"] for rule in rules["externalRules"]}
    assert {metric["external"]["metric"]["name"] for metric in hpa["metrics"]} == served


def test_who_sends_traces_may_send_them(tmp_path: Path) -> None:
    manifests = with_components(tmp_path, ["tracing"])
    endpoints = {
        container.workload: container.environment["NEO_TRACE_ENDPOINT"]
        for container in containers(manifests)
        if "NEO_TRACE_ENDPOINT" in container.environment
    }
    assert endpoints.keys() == {"neo-router", "neo-gpu"}
    for workload, endpoint in endpoints.items():
        url = urlsplit(endpoint)
        assert url.hostname is not None
        allowed = allowed_ports(named(manifests, "NetworkPolicy", workload))
        assert url.port in allowed[url.hostname.partition(".")[2]]
        assert 53 in allowed["kube-system"], "its name has to be found, too"


def allowed_ports(policy: dict[str, Any]) -> dict[str, set[int]]:
    """Namespace -> ports there that pods under the policy may call."""
    found: dict[str, set[int]] = {}
    for rule in policy["spec"]["egress"]:
        for peer in rule.get("to", ()):
            labels = peer.get("namespaceSelector", {}).get("matchLabels", {})
            name = labels.get("kubernetes.io/metadata.name", "")
            found.setdefault(name, set()).update(port["port"] for port in rule["ports"])
    return found


def test_prometheus_scrapes_ports_that_are_there() -> None:
    manifests = overlay("prod")
    for name in ("neo-router", "neo-gpu"):
        monitor = named(manifests, "PodMonitor", name)["spec"]
        labels = named(manifests, "Deployment", name)["spec"]["template"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
        ports = {
            port["name"]
            for c in containers(manifests)
            if c.workload == name
            for port in c.spec.get("ports", ())
        }
        scraped = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
        assert scraped == {port for port in ports if "metrics" in port}
