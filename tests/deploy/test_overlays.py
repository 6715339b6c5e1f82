"""Every overlay, rendered: valid for the API, and what `tests.support.deploy_checks` demands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import kubernetes_validate
import pytest

from tests.support.deploy_checks import CHECKS, services
from tests.support.manifests import (
    OVERLAYS,
    Container,
    Manifest,
    containers,
    of_kind,
    overlay,
)

VERSIONS = ("1.34", kubernetes_validate.latest_version())
"""The oldest that is meant to work (sidecars and the sleep action are stable), and the newest."""
CUSTOM = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
"""Whose schemas are their operators'; `tests/deploy/test_components.py` looks at them."""


def test_there_are_overlays() -> None:
    assert set(OVERLAYS) >= {"dev-kind", "single-node", "prod"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_the_api_would_take_it(name: str, version: str) -> None:
    manifests = overlay(name)
    builtin = [each for each in manifests if each["apiVersion"] not in CUSTOM]
    assert {"Deployment", "Service", "NetworkPolicy", "Role"} <= {each["kind"] for each in builtin}
    for each in builtin:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_everything_is_in_the_overlays_namespace(name: str) -> None:
    manifests = overlay(name)
    (namespace,) = of_kind(manifests, "Namespace")
    cluster_wide = {"Namespace", "PriorityClass"}
    rest = [each for each in manifests if each["kind"] not in cluster_wide]
    assert {each["metadata"]["namespace"] for each in rest} == {namespace["metadata"]["name"]}
    identities = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", OVERLAYS)
def test_it_keeps_to_our_rules(name: str, check: Callable[[Sequence[Manifest]], Any]) -> None:
    assert list(check(overlay(name))) == []


# What the parts are for --------------------------------------------------------------------------


def gpu_containers(name: str) -> dict[str, Container]:
    return {c.name: c for c in containers(overlay(name)) if c.workload == "neo-gpu"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_cpu_service_comes_first_and_goes_last(name: str) -> None:
    found = gpu_containers(name)
    assert list(found) == ["doctor", "cpu-service", "gpu-service"]
    assert [found[each].sidecar for each in found] == [False, True, False]


def test_production_asks_for_gpus_whole_cores_and_one_node() -> None:
    found = gpu_containers("prod")
    arguments = found["doctor"].spec["args"]
    assert {"--require=gpu", "--require=cores", "--require=numa"} <= set(arguments)
    assert found["gpu-service"].amount("limits", "nvidia.com/gpu") == 1
    affinity = found["gpu-service"].pod["affinity"]["nodeAffinity"]
    assert "requiredDuringSchedulingIgnoredDuringExecution" in affinity


def test_a_laptop_needs_no_gpu_and_no_volume() -> None:
    found = gpu_containers("dev-kind")
    assert found["gpu-service"].environment["NEO_DEVICE"] == "cpu"
    assert found["gpu-service"].environment["NEO_MODEL"] == "smollm2"
    assert "affinity" not in found["gpu-service"].pod
    asked = [c.amount("requests", "cpu") or 0 for c in containers(overlay("dev-kind")) if c.serves]
    assert sum(asked) <= 2.5


def test_tls_in_production_leaves_no_port_in_clear_but_health_and_metrics() -> None:
    by_name = {c.name: config for c, config in services(overlay("prod"))}
    assert by_name["router"].tls
    assert by_name["router"].peer_tls
    assert by_name["router"].authenticates
    gpu = by_name["gpu-service"]
    assert gpu.tls.ca
    assert gpu.certificate_roles() == {"neo-router": {"service"}}
    assert gpu.peer_tls is None  # its cpu_service is on loopback
