"""Proof that the rules of `tests.support.deploy_checks` find fault: installations with one thing
wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.deploy_checks import CHECKS
from tests.support.manifests import Manifest, containers, named, overlay

Manifests = list[Manifest]
Mutant = Callable[[Manifests], object]
NAME = "app.kubernetes.io/name"


def container(manifests: Manifests, name: str) -> dict[str, Any]:
    return next(c.spec for c in containers(manifests) if c.name == name)


def variable(name: str, key: str, value: str) -> Mutant:
    def change(manifests: Manifests) -> None:
        entries = container(manifests, name)["env"]
        entries[:] = [entry for entry in entries if entry["name"] != key]
        entries.append({"name": key, "value": value})

    return change


def argument(name: str, flag: str) -> Mutant:
    return lambda manifests: container(manifests, name)["args"].append(flag)


def resources(amounts: dict[str, str], *names: str) -> Mutant:
    """Requests and limits of these containers."""

    def change(manifests: Manifests) -> None:
        for name in names:
            for which in ("requests", "limits"):
                container(manifests, name)["resources"][which].update(amounts)

    return change


def of(name: str, *path: str | int, **update: Any) -> Mutant:
    """Change what is at `path` in a container's spec; nothing given: remove it."""
    return lambda manifests: _at(container(manifests, name), path, update)


def pod(name: str, *path: str | int, **update: Any) -> Mutant:
    return lambda manifests: _at(
        named(manifests, "Deployment", name)["spec"]["template"]["spec"], path, update
    )


def thing(kind: str, name: str, *path: str | int, **update: Any) -> Mutant:
    return lambda manifests: _at(named(manifests, kind, name), path, update)


def _at(found: Any, path: tuple[str | int, ...], update: dict[str, Any]) -> None:
    for step in path if update else path[:-1]:
        found = found[step]
    if update:
        found.update(update)
    else:
        found.pop(path[-1])


MUTANTS: dict[str, tuple[str, Mutant]] = {
    "a slip in a name": ("configured", variable("router", "NEO_LISTEM", "x")),
    "no such setting": ("configured", variable("router", "NEO_COFFEE", "x")),
    "a variable of nobody": ("configured", variable("router", "COFFEE", "x")),
    "a bad value": ("configured", variable("gpu-service", "NEO_LEASE_SECONDS", "soon")),
    "a bad combination": ("configured", variable("gpu-service", "NEO_TLS_KEY", "/tmp/key")),
    "no such flag": ("configured", argument("cpu-service", "--coffee")),
    "no such flag of the doctor": ("configured", argument("doctor", "--coffee")),
    "root": ("hardened", pod("neo-gpu", "securityContext", runAsNonRoot=False)),
    "capabilities": ("hardened", of("router", "securityContext", "capabilities")),
    "writable": ("hardened", of("doctor", "securityContext", readOnlyRootFilesystem=False)),
    "privileges": ("hardened", of("doctor", "securityContext", allowPrivilegeEscalation=True)),
    "no seccomp": ("hardened", pod("neo-router", "securityContext", "seccompProfile")),
    "a token": ("hardened", pod("neo-gpu", automountServiceAccountToken=True)),
    "links": ("hardened", pod("neo-gpu", "enableServiceLinks")),
    "no liveness": ("probed", of("router", "livenessProbe")),
    "no readiness": ("probed", of("gpu-service", "readinessProbe")),
    "liveness is readiness": (
        "probed", of("gpu-service", "livenessProbe", "grpc", service="readiness"),
    ),
    "readiness is liveness": ("probed", of("router", "readinessProbe", "grpc", service="liveness")),
    "a name that nobody sets": ("probed", of("router", "startupProbe", "grpc", service="started")),
    "probe of the TLS port": ("probed", of("router", "readinessProbe", "grpc", port=7000)),
    "health on loopback": (
        "probed", variable("cpu-service", "NEO_HEALTH_LISTEN", "127.0.0.1:7121"),
    ),
    "too little grace": ("budgeted", pod("neo-gpu", terminationGracePeriodSeconds=140)),
    "a longer drain": ("budgeted", variable("router", "NEO_DRAIN_GRACE_SECONDS", "150")),
    "the router first": ("budgeted", variable("router", "NEO_DRAIN_GRACE_SECONDS", "60")),
    "no preStop": ("budgeted", of("gpu-service", "lifecycle")),
    "burstable": ("guaranteed", of("cpu-service", "resources", "requests", memory="1Gi")),
    "half a CPU": ("guaranteed", resources({"cpu": "1500m"}, "doctor", "cpu-service")),
    "another size measured": ("guaranteed", resources({"memory": "1Gi"}, "doctor")),
    "a GPU too many": ("guaranteed", resources({"nvidia.com/gpu": "1"}, "cpu-service")),
    "no memory limit": ("limited", of("router", "resources", "limits", "memory")),
    "an endless volume": ("limited", pod("neo-gpu", "volumes", 0, "emptyDir", "sizeLimit")),
    "a volume that is missing": ("mounted", pod("neo-gpu", "volumes", 0)),
    "a volume that nobody mounts": ("mounted", of("gpu-service", "volumeMounts", 2)),
    "the socket on a disk": ("mounted", pod("neo-gpu", "volumes", 0, "emptyDir", "medium")),
    "a file on no volume": ("mounted", variable("cpu-service", "NEO_RUNTIME_DIR", "/var/x")),
    "a socket of its own": ("mounted", variable("cpu-service", "NEO_RUNTIME_DIR", "/tmp")),
    "a port moved": ("connected", variable("gpu-service", "NEO_LISTEN", "0.0.0.0:7002")),
    "a metrics port moved": ("connected", variable("router", "NEO_METRICS_PORT", "9000")),
    "an open cpu_service": ("connected", variable("cpu-service", "NEO_LISTEN", "0.0.0.0:7101")),
    "another cpu_service": (
        "connected", variable("gpu-service", "NEO_CPU_SERVICES", "127.0.0.1:7102"),
    ),
    "a Service's port": (
        "connected", thing("Service", "neo-router", "spec", "ports", 0, targetPort="metrics"),
    ),
    "another backend": ("connected", variable("router", "NEO_BACKENDS", "elsewhere:7001")),
    "a selector": (
        "selected", thing("Service", "neo-gpu", "spec", "selector", **{NAME: "gpu"}),
    ),
    "a spread over others": (
        "selected",
        pod("neo-gpu", "topologySpreadConstraints", 0, "labelSelector", "matchLabels", x="y"),
    ),
    "two who scale": ("selected", thing("Deployment", "neo-router", "spec", replicas=2)),
    "no account": ("selected", pod("neo-gpu", "serviceAccountName")),
    "no priority": ("selected", pod("neo-router", "priorityClassName")),
    "an operators' port": (
        "isolated",
        thing("NetworkPolicy", "neo-router", "spec", "ingress", 0, ports=[{"port": 7010}]),
    ),
    "anybody on the GPU": (
        "isolated",
        thing("NetworkPolicy", "neo-gpu", "spec", "ingress", 0, **{"from": [{"podSelector": {}}]}),
    ),
    "an open door": ("isolated", thing("NetworkPolicy", "neo-nothing", "spec", ingress=[{}])),
    "one direction": (
        "isolated", thing("NetworkPolicy", "neo-gpu", "spec", policyTypes=["Ingress"]),
    ),
    "a router that writes": (
        "isolated", thing("Role", "neo-router", "rules", 0, verbs=["get", "delete"]),
    ),
}  # fmt: skip
"""Which check finds it, and what it does to a good installation."""


def problems(name: str, manifests: Manifests) -> list[str]:
    check = next(check for check in CHECKS if check.__name__ == name)
    try:
        return list(check(manifests))
    except ValueError as error:  # a configuration that no longer loads
        return [str(error)]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_rule_finds_fault(mutant: str) -> None:
    name, change = MUTANTS[mutant]
    manifests = overlay("single-node")
    assert not problems(name, manifests)
    change(manifests)
    assert problems(name, manifests)


def test_each_rule_has_a_mutant() -> None:
    assert {name for name, _ in MUTANTS.values()} == {check.__name__ for check in CHECKS}
