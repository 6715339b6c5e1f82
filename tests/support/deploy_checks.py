"""What must hold of every installation; each check returns what is wrong, in sentences."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cpu_service.config import CpuServiceConfig
from gpu_service.config import GpuServiceConfig
from neo_client import cli
from neo_common.config import ConfigError, load
from neo_common.grpc.settings import is_loopback
from router.config import RouterConfig
from tests.support.manifests import Container, Manifest, containers, named, of_kind

CONFIGS: dict[str, type[Any]] = {
    "router": RouterConfig,
    "gpu-service": GpuServiceConfig,
    "cpu-service": CpuServiceConfig,
}
NOT_OURS = {
    "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_VISIBLE_DEVICES", "TRITON_CACHE_DIR", "XDG_CACHE_HOME",
    "HOME",
}  # fmt: skip
MARGIN_SECONDS = 10
"""Between the end of a drain and SIGKILL: last answers, the engine's end, the process's."""
SIDECAR_END_SECONDS = 10
HEALTH_NAMES = {"readiness", "liveness"}


def settings(container: Container) -> Any:
    """The configuration that the service would run with. Raises ConfigError.

    `--config` names a file that is made in the cluster: what the doctor writes is checked in its
    own tests."""
    arguments = [arg for arg in container.spec.get("args", ()) if not arg.startswith("--config=")]
    unknown = [
        name
        for name in container.environment
        if not name.startswith("NEO_") and name not in NOT_OURS
    ]
    if unknown:
        raise ConfigError(f"{unknown[0]} is nobody's")
    cls = CONFIGS[container.name]
    fields = {f"NEO_{name.upper()}" for name in cls.__dataclass_fields__}
    for name in container.environment:
        if name.startswith("NEO_") and name not in fields:
            raise ConfigError(f"{name} is no setting")
    return load(cls, arguments, prog="", description="", environment=container.environment)


def services(manifests: Sequence[Manifest]) -> list[tuple[Container, Any]]:
    """Ours, with their configurations."""
    ours = [container for container in containers(manifests) if container.name in CONFIGS]
    return [(container, settings(container)) for container in ours]


def configured(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every flag and variable is a setting, with a value that it takes; the doctor's flags, too."""
    for container in containers(manifests):
        if container.name in CONFIGS:
            try:
                settings(container)
            except ConfigError as error:
                yield f"{container.name}: {error}"
        elif container.spec.get("command") == ["neo", "doctor"]:
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
                cli.parser().parse_args(["doctor", *container.spec["args"]])
            if said.getvalue():
                yield f"doctor: {said.getvalue().splitlines()[-1]}"
        else:
            yield f"{container.name}: nobody knows what runs here"


def hardened(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Non-root, read-only, without privileges, as the Pod Security Standard "restricted" has it."""
    for container in containers(manifests):
        pod, own = (
            container.pod.get("securityContext", {}),
            container.spec.get("securityContext", {}),
        )
        wanted = {
            "runs as root": pod.get("runAsNonRoot") is True and pod.get("runAsUser", 0) > 0,
            "has no seccomp profile": pod.get("seccompProfile") == {"type": "RuntimeDefault"},
            "may gain privileges": own.get("allowPrivilegeEscalation") is False,
            "keeps capabilities": own.get("capabilities") == {"drop": ["ALL"]},
            "can write to its root": own.get("readOnlyRootFilesystem") is True,
            "can be reached by links' variables": container.pod.get("enableServiceLinks") is False,
        }
        yield from (f"{container.name} {what}" for what, holds in wanted.items() if not holds)
        token = container.pod.get("automountServiceAccountToken")
        if token is not (container.workload == "neo-router"):
            yield f"{container.workload}: a token is for the router alone"


def probed(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Native gRPC probes on the port for health, under names that mean what the probe means."""
    for container, config in services(manifests):
        host, _, port = config.health_listen.rpartition(":")
        if is_loopback(f"{host}:{port}") or not port:
            yield f"{container.name}: a kubelet cannot reach {config.health_listen!r}"
        names = {}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container.spec.get(probe, {}).get("grpc")
            if asked is None:
                if probe != "readinessProbe" or not container.sidecar:
                    yield f"{container.name} has no gRPC {probe}"
                continue
            names[probe] = asked.get("service")
            if str(asked["port"]) != port:
                yield f"{container.name}: {probe} asks port {asked['port']}, health is at {port}"
        if not set(names.values()) <= HEALTH_NAMES:
            yield f"{container.name}: probes ask for {names}"
        if names.get("livenessProbe") != "liveness":
            yield f"{container.name}: a drain would look like a dead process"
        if names.get("readinessProbe", "readiness") != "readiness":
            yield f"{container.name}: it would get calls before it can take them"


def budgeted(manifests: Sequence[Manifest]) -> Iterator[str]:
    """terminationGracePeriodSeconds >= preStop + drain + margin; a router outlasts its backends."""
    found = services(manifests)
    graces = {container.name: config.drain_grace_seconds for container, config in found}
    for workload in {container.workload for container, _ in found}:
        mine = [(c, config) for c, config in found if c.workload == workload]
        needed: float = MARGIN_SECONDS
        for container, config in mine:
            if container.sidecar:  # told only when the others have ended
                needed += min(config.drain_grace_seconds, SIDECAR_END_SECONDS)
                continue
            stop = container.spec.get("lifecycle", {}).get("preStop", {})
            pause = stop.get("sleep", {}).get("seconds", 0)
            if not pause:
                yield f"{container.name} stops before others have heard of it"
            needed += pause + config.drain_grace_seconds
        granted = mine[0][0].pod["terminationGracePeriodSeconds"]
        if granted < needed:
            yield f"{workload}: killed after {granted} s, needs {needed:g} s"
    if graces["router"] < graces["gpu-service"] + 5:
        yield "the router cuts streams that a gpu_service still feeds"


def guaranteed(manifests: Sequence[Manifest]) -> Iterator[str]:
    """GPU pods: limits = requests, whole CPUs, in every container; the first one measures what the
    cpu_service gets."""
    mine = {c.name: c for c in containers(manifests) if c.workload == "neo-gpu"}
    for container in mine.values():
        for resource in ("cpu", "memory"):
            asked, limit = (container.amount(which, resource) for which in ("requests", "limits"))
            if asked is None or asked != limit:
                yield f"{container.name}: {resource} limit {limit} is not the request {asked}"
            elif resource == "cpu" and asked != int(asked):
                yield f"{container.name}: {asked} CPUs are not whole"
    for resource in ("cpu", "memory"):
        measured, real = (mine[n].amount("limits", resource) for n in ("doctor", "cpu-service"))
        if measured != real:
            yield f"the doctor measures {measured} {resource}, the cpu_service gets {real}"
    gpus = {name: c.amount("limits", "nvidia.com/gpu") for name, c in mine.items()}
    if gpus["cpu-service"] is not None or gpus["doctor"] != gpus["gpu-service"]:
        yield f"GPUs are given to the wrong containers: {gpus}"


def limited(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every container has a memory limit and a CPU request; each volume in memory or scratch a
    size."""
    for container in containers(manifests):
        if container.amount("limits", "memory") is None or not container.amount("requests", "cpu"):
            yield f"{container.name} has no memory limit or no CPU request"
        for volume in container.pod.get("volumes", ()):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{container.workload}: volume {volume['name']} has no sizeLimit"


def mounted(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Mounts name volumes, volumes are mounted, files that settings name are under mounts, and both
    services see the socket's folder, in memory, under one path."""
    for container in containers(manifests):
        volumes = {volume["name"]: volume for volume in container.pod.get("volumes", ())}
        mounts = {m["mountPath"]: m["name"] for m in container.spec.get("volumeMounts", ())}
        yield from (
            f"{container.name}: no volume {name}" for name in set(mounts.values()) - set(volumes)
        )
        named_files = [
            value for name, value in container.environment.items() if value.startswith("/")
        ] + [arg.partition("=")[2] for arg in container.spec.get("args", ()) if "=/" in arg]
        for path in named_files:
            if not any(Path(path).is_relative_to(mount) for mount in mounts):
                yield f"{container.name}: {path} is on no volume"
    used = {m["name"] for c in containers(manifests) for m in c.spec.get("volumeMounts", ())}
    there = {v["name"] for c in containers(manifests) for v in c.pod.get("volumes", ())}
    yield from (f"volume {name} is mounted nowhere" for name in there - used)
    for name in ("cpu-service", "gpu-service", "doctor"):
        container = next(c for c in containers(manifests) if c.name == name)
        run = {m["mountPath"]: m["name"] for m in container.spec["volumeMounts"]}.get("/run/neo")
        if run is None:
            yield f"{name} does not see /run/neo"
            continue
        volumes = {v["name"]: v for v in container.pod["volumes"]}
        if volumes.get(run, {}).get("emptyDir", {}).get("medium") != "Memory":
            yield f"{name}: /run/neo is not in memory"
    cpu = next(config for c, config in services(manifests) if c.name == "cpu-service")
    if cpu.runtime_dir != "/run/neo":
        yield f"the gpu_service cannot see {cpu.runtime_dir}"


def connected(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Ports agree, from listeners through containers, Services and policies to who calls."""
    for container, config in services(manifests):
        declared = {port["containerPort"] for port in container.spec["ports"]}
        listening = {config.metrics_port, int(config.health_listen.rpartition(":")[2])}
        for address in (config.listen, getattr(config, "http_listen", "")):
            if address and not is_loopback(address):
                listening.add(int(address.rpartition(":")[2]))
        if declared != listening:
            yield f"{container.name} declares ports {declared} and listens on {listening}"
    by_name = {c.name: config for c, config in services(manifests)}
    if by_name["gpu-service"].cpu_services != (by_name["cpu-service"].listen,):
        yield "the gpu_service looks for another cpu_service"
    if not is_loopback(by_name["cpu-service"].listen):
        yield "anybody may open a session with the cpu_service"
    for service in of_kind(manifests, "Service"):
        ports = {
            port["name"]: port["containerPort"]
            for c in containers(manifests)
            if c.workload in (service["spec"]["selector"].get("app.kubernetes.io/name"),)
            for port in c.spec.get("ports", ())
        }
        for port in service["spec"]["ports"]:
            if ports.get(port["targetPort"]) != port["port"]:
                yield f"Service {service['metadata']['name']} sends {port} to {ports}"
    gpu_port = by_name["gpu-service"].listen.rpartition(":")[2]
    for backend in by_name["router"].backends:
        if not backend.endswith(f"neo-gpu:{gpu_port}"):
            yield f"the router's backend {backend} is not the Service neo-gpu"


def selected(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Selectors find pods; scalers, budgets, bindings and accounts name what is there."""
    pods = [
        workload["spec"]["template"]["metadata"]["labels"]
        for workload in of_kind(manifests, "Deployment")
    ]

    def finds(labels: dict[str, str]) -> bool:
        return any(labels.items() <= pod.items() for pod in pods)

    for each in manifests:
        who, spec = f"{each['kind']} {each['metadata']['name']}", each.get("spec", {})
        yield from (
            f"{who} selects no pod: {labels}" for labels in _selectors(each) if not finds(labels)
        )
        target = spec.get("scaleTargetRef")
        if target is not None:
            scaled = named(manifests, target["kind"], target["name"])
            if "replicas" in scaled["spec"]:
                yield f"{who} and the manifest both say how many {target['name']} there are"
    accounts = {each["metadata"]["name"] for each in of_kind(manifests, "ServiceAccount")}
    priorities = {each["metadata"]["name"] for each in of_kind(manifests, "PriorityClass")}
    for container in containers(manifests):
        if container.pod.get("serviceAccountName") not in accounts:
            yield f"{container.workload} has no account of its own"
        if container.pod.get("priorityClassName") not in priorities:
            yield f"{container.workload} has no priority class"


def _selectors(manifest: Manifest) -> Iterator[dict[str, str]]:
    """Labels by which it looks for pods."""
    spec = manifest.get("spec", {})
    chosen = spec.get("selector", spec.get("podSelector", {}))
    yield chosen.get("matchLabels", chosen if manifest["kind"] == "Service" else {})
    if manifest["kind"] == "Deployment":
        for constraint in spec["template"]["spec"].get("topologySpreadConstraints", ()):
            yield constraint["labelSelector"]["matchLabels"]


def isolated(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Everything is denied first; what is allowed in is a port on which the pod listens, and only
    the router may call GPU pods."""
    policies = {
        each["metadata"]["name"]: each["spec"] for each in of_kind(manifests, "NetworkPolicy")
    }
    if "ingress" in policies["neo-nothing"] or "egress" in policies["neo-nothing"]:
        yield "neo-nothing allows something"
    for name in ("neo-router", "neo-gpu"):
        if policies[name]["policyTypes"] != ["Ingress", "Egress"]:
            yield f"{name} is not about both directions"
        listening = {
            port["containerPort"]
            for c in containers(manifests)
            if c.workload == name
            for port in c.spec.get("ports", ())
        }
        allowed = {p["port"] for rule in policies[name]["ingress"] for p in rule["ports"]}
        if not allowed <= listening:
            yield f"{name} lets calls in on {allowed - listening}, where nobody listens"
    for rule in policies["neo-gpu"]["ingress"]:
        if any(port["port"] == 7001 for port in rule["ports"]):
            callers = [peer.get("podSelector", {}).get("matchLabels", {}) for peer in rule["from"]]
            if any(c.get("app.kubernetes.io/name") != "neo-router" for c in callers):
                yield "others than the router may call GPU pods"
    role = named(manifests, "Role", "neo-router")
    if {verb for rule in role["rules"] for verb in rule["verbs"]} - {"get", "list", "watch"}:
        yield "the router may change something"


CHECKS: tuple[Callable[[Sequence[Manifest]], Iterator[str]], ...] = (
    configured, hardened, probed, budgeted, guaranteed, limited, mounted, connected, selected,
    isolated,
)  # fmt: skip
