"""Facts from faked file trees; reports as files, messages and metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from neo_common.machine import report
from neo_common.machine.facts import Gpu, HugePages, Machine, MemoryRate, NumaNode, look
from neo_common.machine.kernel import Roots, chosen, cpu_flags, cpu_quota, numbers_of

GIB = 1 << 30
FILES = {
    "proc/cpuinfo": "processor : 0\nflags\t\t: fpu avx2 sse avx512f\n",
    "proc/meminfo": "MemTotal: 134217728 kB\nMemAvailable: 67108864 kB\n",
    "proc/self/status": "Name:\tpython\nCpus_allowed_list:\t4-7,12\nMems_allowed_list:\t1\n",
    "proc/self/limits": (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max open files            1048576              1048576              files     \n"
        "Max locked memory         8388608              8388608              bytes     \n"
    ),
    "proc/self/cgroup": "0::/\n",
    "cgroup/memory.max": str(16 * GIB),
    "cgroup/memory.current": str(2 * GIB),
    "cgroup/memory.stat": f"inactive_file {GIB}\n",
    "cgroup/cpu.max": "400000 100000",
    "cgroup/hugetlb.2MB.max": str(4 * GIB),
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size advise [never] deny\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "4096",
    "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "3072",
    "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages": "0",
    "sys/devices/system/node/node0/cpulist": "0-3,8-11\n",
    "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal: 67108864 kB\n",
    "sys/devices/system/node/node1/cpulist": "4-7,12-15\n",
    "sys/devices/system/node/node1/meminfo": (
        "Node 1 MemTotal: 67108864 kB\nNode 1 MemFree: 1048576 kB\n"
    ),
}


def tree(folder: Path, changes: dict[str, str | None] | None = None) -> Roots:
    """A machine's files, some of them changed or (None) left out."""
    for name, text in {**FILES, **(changes or {})}.items():
        if text is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return Roots(folder / "proc", folder / "cgroup", folder / "sys", folder / "shm")


def test_a_container_on_one_of_two_nodes(tmp_path: Path) -> None:
    machine = look(tree(tmp_path))
    assert machine.cpu_flags == ("avx2", "avx512f")
    assert machine.cpus == (4, 5, 6, 7, 12)
    assert (machine.quota, machine.whole_cpus) == (4.0, 4)
    assert (machine.memory_bytes, machine.memory_limit_bytes) == (128 * GIB, 16 * GIB)
    assert machine.memory.bytes == 15 * GIB  # what can be reclaimed is not used
    assert (machine.memlock_bytes, machine.open_files) == (8 << 20, 1 << 20)
    assert (machine.thp, machine.shmem_thp) == ("madvise", "never")
    assert machine.hugepages == (
        HugePages(2 << 20, 4096, 3072, 4 * GIB), HugePages(GIB, 0, 0, None),
    )  # fmt: skip
    assert [pages.usable_bytes for pages in machine.hugepages] == [4 * GIB, 0]
    assert machine.numa == (
        NumaNode(0, (0, 1, 2, 3, 8, 9, 10, 11), 64 * GIB, 0),
        NumaNode(1, (4, 5, 6, 7, 12, 13, 14, 15), 64 * GIB, GIB),
    )
    assert (machine.cpu_nodes, machine.nodes) == ((1,), (1,))
    assert machine.shm_bytes == 0


def test_a_machine_without_limits(tmp_path: Path) -> None:
    machine = look(
        tree(
            tmp_path,
            {
                "cgroup/memory.max": "max", "cgroup/cpu.max": "max 100000",
                "cgroup/hugetlb.2MB.max": "max",
                "proc/self/limits": "Max locked memory         unlimited    unlimited    bytes\n",
            },
        )
    )  # fmt: skip
    assert (machine.quota, machine.whole_cpus) == (None, 5)
    assert machine.memory_limit_bytes is None
    assert machine.memlock_bytes is None
    assert machine.hugepages[0].limit_bytes is None


def test_the_old_hierarchy(tmp_path: Path) -> None:
    """v1 says "no limit" with a number larger than any machine."""
    v1 = {
        "proc/self/cgroup": "9:hugetlb:/pod\n5:memory:/pod\n4:cpu,cpuacct:/pod\n",
        "cgroup/memory/memory.limit_in_bytes": str((1 << 63) - 4096),
        "cgroup/memory/pod/memory.limit_in_bytes": str(8 * GIB),
        "cgroup/memory/pod/memory.usage_in_bytes": str(GIB),
        "cgroup/cpu/pod/cpu.cfs_quota_us": "250000",
        "cgroup/cpu/pod/cpu.cfs_period_us": "100000",
        "cgroup/hugetlb/pod/hugetlb.2MB.limit_in_bytes": str(2 * GIB),
    }
    unified = {name: None for name in FILES if name.startswith("cgroup/")}
    machine = look(tree(tmp_path, {**unified, **v1}))
    assert (machine.memory_limit_bytes, machine.memory.bytes) == (8 * GIB, 7 * GIB)
    assert machine.quota == 2.5
    assert machine.hugepages[0].limit_bytes == 2 * GIB


def test_a_kernel_that_shows_nothing(tmp_path: Path) -> None:
    machine = look(tree(tmp_path, {name: None for name in FILES if name != "proc/meminfo"}))
    assert machine.cpus
    assert (machine.numa, machine.hugepages, machine.cpu_flags) == ((), (), ())


def test_this_machine_can_be_looked_at() -> None:
    machine = look()
    assert len(machine.cpus) >= 1
    assert machine.memory.bytes > 0
    assert machine.open_files > 0


def test_small_files(tmp_path: Path) -> None:
    assert numbers_of("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    assert numbers_of("\n") == ()
    assert cpu_flags(Roots(proc=tmp_path)) == ()
    assert chosen(tmp_path / "none") == ""


def quota_of(folder: Path, membership: str, files: dict[str, str]) -> float | None:
    """As it is read on a machine where this process is in `membership`."""
    empty = dict.fromkeys(FILES)
    files = {f"cgroup/{name}": text for name, text in files.items()}
    return cpu_quota(tree(folder, {**empty, "proc/self/cgroup": membership + "\n", **files}))


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


# Reports ---------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    gpu = Gpu("H100", 80 * GIB, "0000:0f:00.0", 1, 55e9, 54e9)
    return replace(look(tree(tmp_path / "tree")), gpus=(gpu,), rates=(MemoryRate(6, 60e9),))


def test_a_report_survives_its_file(tmp_path: Path, machine: Machine) -> None:
    path = tmp_path / "machine.json"
    report.save(machine, path)
    assert report.load(str(path)) == machine


@pytest.mark.parametrize("text", [None, "", "{}", '{"cores": "two"}'])
def test_a_report_that_cannot_be_used_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "machine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="machine_report"):
        report.load(str(path))


def test_the_message_says_what_the_facts_say(machine: Machine) -> None:
    said = report.message(machine)
    assert list(said.allowed_cpus) == list(machine.cpus)
    assert (said.cpu_quota, said.memory_limit_bytes) == (4.0, 16 * GIB)
    assert (said.gpus[0].numa_node, said.gpus[0].to_host_bytes_per_second) == (1, 54e9)
    assert said.hugepages[0].HasField("limit_bytes")
    assert not said.hugepages[1].HasField("limit_bytes")
    unset = {field.name for field in said.DESCRIPTOR.fields} - {
        f.name for f, _ in said.ListFields()
    }
    assert unset == {"dev_shm_bytes"}
    free = report.message(replace(machine, quota=None, memory_limit_bytes=None, memlock_bytes=None))
    for name in ("cpu_quota", "memory_limit_bytes", "memlock_bytes"):
        assert not free.HasField(name)


def test_metrics_show_what_is_known(machine: Machine) -> None:
    registry = CollectorRegistry()
    registry.register(report.MachineCollector(machine))
    text = generate_latest(registry).decode()
    assert 'neo_machine_memory_read_bytes_per_second{threads="6"} 6e+10' in text
    assert 'direction="to_device",gpu="0000:0f:00.0"} 5.5e+10' in text
    assert "neo_machine_cpu_quota 4.0" in text
    assert 'shared_hugepages="never"' in text
    bare = CollectorRegistry()
    bare.register(report.MachineCollector(replace(machine, quota=None, rates=(), gpus=())))
    text = generate_latest(bare).decode()
    assert "neo_machine_cpu_quota " not in text
    assert "bytes_per_second{" not in text
