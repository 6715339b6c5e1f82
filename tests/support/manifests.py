"""What kustomize makes of deploy/k8s, without a cluster."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]
K8S = REPO / "deploy/k8s"
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = tuple(sorted(path.name for path in (K8S / "overlays").iterdir()))
COMPONENTS = tuple(sorted(path.name for path in (K8S / "components").iterdir()))

Manifest = dict[str, Any]
SUFFIXES = {
    "": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30,
}  # fmt: skip


def render(folder: Path) -> list[Manifest]:
    """A fresh copy each time: tests may change it."""
    return copy.deepcopy(_rendered(folder))


@functools.cache
def _rendered(folder: Path) -> list[Manifest]:
    done = subprocess.run(
        [KUBECTL, "kustomize", str(folder)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"kustomize warns: {done.stderr}"
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def overlay(name: str) -> list[Manifest]:
    return render(K8S / "overlays" / name)


def with_components(folder: Path, names: Sequence[str]) -> list[Manifest]:
    """The base with these components, in an overlay made in `folder`."""
    # Kustomize takes relative paths only.
    to_k8s = Path(*[".."] * (len(folder.resolve().parts) - 1)) / str(K8S).lstrip("/")
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [str(to_k8s / "base")],
                "components": [str(to_k8s / "components" / name) for name in names],
            }
        )
    )
    return render(folder)


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> Iterator[Manifest]:
    return (each for each in manifests if each["kind"] in kinds)


def named(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    return next(each for each in of_kind(manifests, kind) if each["metadata"]["name"] == name)


@dataclass(frozen=True)
class Container:
    """One container and the workload that it is of."""

    workload: str
    pod: dict[str, Any]
    """The pod's spec."""
    spec: dict[str, Any]
    init: bool

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def sidecar(self) -> bool:
        return self.init and self.spec.get("restartPolicy") == "Always"

    @property
    def serves(self) -> bool:
        """It is there as long as the pod is."""
        return self.sidecar or not self.init

    @property
    def environment(self) -> dict[str, str]:
        return {entry["name"]: str(entry.get("value", "")) for entry in self.spec.get("env", ())}

    def amount(self, which: str, resource: str) -> float | None:
        """`which`: requests or limits."""
        said = self.spec.get("resources", {}).get(which, {}).get(resource)
        return None if said is None else quantity(str(said))


def containers(manifests: Sequence[Manifest]) -> list[Container]:
    found = []
    for workload in of_kind(manifests, "Deployment", "StatefulSet", "DaemonSet"):
        pod = workload["spec"]["template"]["spec"]
        name = workload["metadata"]["name"]
        found += [Container(name, pod, spec, True) for spec in pod.get("initContainers", ())]
        found += [Container(name, pod, spec, False) for spec in pod["containers"]]
    return found


def quantity(text: str) -> float:
    """Of Kubernetes' notation, such as 500m or 16Gi."""
    digits = text.rstrip("KMGimk")
    return float(digits) * SUFFIXES[text[len(digits) :]]
