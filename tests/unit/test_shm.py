"""Sealed memory files, the handoff of descriptors, and how much memory may be taken."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import mmap
import os
import socket
from pathlib import Path

import pytest

from neo_common.shm.handoff import HandoffRefused, HandoffServer, fetch, has_ended
from neo_common.shm.limits import memory_headroom
from neo_common.shm.memory import SharedMemory, boot_id, round_to_pages


def open_fds() -> int:
    # What earlier tests left to the collector would else close in the middle of one that counts.
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_memory_is_zeroed_shared_and_cannot_change_size() -> None:
    with SharedMemory.create("test", 5000) as memory:
        assert memory.size == round_to_pages(5000) == 2 * mmap.PAGESIZE
        assert memory.buffer[:] == bytes(memory.size)
        with SharedMemory.adopt(os.dup(memory.fd), 5000) as other:
            other.buffer[17] = 3
            assert memory.buffer[17] == 3
            assert other.identity() == memory.identity()
        for size in (0, memory.size // 2, memory.size * 2):
            with pytest.raises(OSError, match="Operation not permitted"):
                os.ftruncate(memory.fd, size)


def test_memory_outlives_close_while_somebody_looks_at_it() -> None:
    memory = SharedMemory.create("test", 4096)
    view = memoryview(memory.buffer)
    memory.close()
    view[0] = 9
    assert view[0] == 9


def test_foreign_descriptors_are_refused_and_closed(tmp_path: Path) -> None:
    before = open_fds()
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, 4096)
    with pytest.raises(ValueError, match="not a memory file"):
        SharedMemory.adopt(plain, 4096)
    unsealed = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with pytest.raises(ValueError, match="sealed in size"):
        SharedMemory.adopt(unsealed, 4096)
    frozen = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(frozen, 4096)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(frozen, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(ValueError, match="cannot be mapped"):
        SharedMemory.adopt(frozen, 4096)
    with SharedMemory.create("test", 4096) as memory, pytest.raises(ValueError, match="not 8192"):
        SharedMemory.adopt(os.dup(memory.fd), 8192)
    assert open_fds() == before


async def test_handoff_passes_descriptors_once_and_the_tether_ends(tmp_path: Path) -> None:
    server = HandoffServer(tmp_path / "run")
    server.start()
    assert server.path.stat().st_mode & 0o777 == 0o600
    assert server.path.parent.stat().st_mode & 0o777 == 0o700
    with SharedMemory.create("pool", 4096) as pool, SharedMemory.create("control", 4096) as control:
        received: list[int] = []

        def take(fds: list[int]) -> list[int]:
            received.extend(fds)
            return [control.fd]

        offer = server.offer(take)
        tether, fds = await asyncio.to_thread(fetch, str(server.path), offer.token, [pool.fd])
        assert offer.fetched
        with (
            SharedMemory.adopt(fds[0], 4096) as same,
            SharedMemory.adopt(received[0], 4096) as handed,
        ):
            assert same.identity() == control.identity()
            assert handed.identity() == pool.identity()
        assert not has_ended(tether)
        with pytest.raises(HandoffRefused, match="not known, or was used"):
            await asyncio.to_thread(fetch, str(server.path), offer.token)
        offer.end()
        assert has_ended(tether)
        tether.close()
    server.close()
    assert not server.path.exists()


async def test_handoff_refuses_strangers_and_closes_what_they_sent(tmp_path: Path) -> None:
    server = HandoffServer(tmp_path)
    server.start()
    server.offer(lambda fds: [])
    before = open_fds()
    with SharedMemory.create("pool", 4096) as pool:
        for token in (b"", b"x" * 32, b"x" * 500):
            with pytest.raises(HandoffRefused):
                await asyncio.to_thread(fetch, str(server.path), token, [pool.fd])
        with pytest.raises(HandoffRefused):  # more descriptors than any request has
            await asyncio.to_thread(fetch, str(server.path), b"x" * 32, [pool.fd] * 9)
    refusing = server.offer(lambda fds: (_ for _ in ()).throw(ValueError("no such pool")))
    with pytest.raises(HandoffRefused, match="no such pool"):
        await asyncio.to_thread(fetch, str(server.path), refusing.token)
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    silent.connect(str(server.path))
    silent.close()
    await asyncio.sleep(0)
    server.close()
    assert open_fds() <= before


async def test_sockets_of_killed_services_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / "neo-cpu-stale"
    stale.mkdir()
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(str(stale / "handoff"))
    dead.close()
    live = HandoffServer(tmp_path)
    live.start()
    assert not stale.exists()
    beside = HandoffServer(tmp_path)
    beside.start()
    assert live.path.exists()
    live.close()
    beside.close()


@pytest.mark.parametrize("folder", ["x" * 120, "file/below"])
async def test_unusable_runtime_dir_is_one_sentence(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="runtime_dir"):
        HandoffServer(tmp_path / folder).start()


def test_boot_id_is_that_of_the_kernel() -> None:
    assert boot_id() == boot_id()
    assert len(boot_id()) == 36


def fake_proc(root: Path, available_kib: int, groups: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    return root / "proc"


def write_group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_headroom_without_limits_is_what_the_machine_has(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, 1000, "0::/a\n")
    write_group(tmp_path / "cg/a", {"memory.max": "max\n", "memory.current": "5\n"})
    headroom = memory_headroom(proc, tmp_path / "cg")
    assert headroom.bytes == 1000 * 1024
    assert "machine" in headroom.source


def test_headroom_obeys_an_ancestor_and_does_not_count_page_cache(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, 1000, "0::/a/b\n")
    write_group(tmp_path / "cg/a/b", {"memory.max": "max\n", "memory.current": "600\n"})
    write_group(
        tmp_path / "cg/a",
        {
            "memory.max": "1000\n",
            "memory.current": "700\n",
            "memory.stat": "anon 1\ninactive_file 200\n",
        },
    )
    headroom = memory_headroom(proc, tmp_path / "cg")
    assert headroom.bytes == 1000 - (700 - 200)
    assert "container" in headroom.source


def test_headroom_reads_cgroup_v1_where_only_the_mount_root_is_seen(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, 1000, "4:memory:/docker/abc\n0::/\n")
    write_group(
        tmp_path / "cg/memory",
        {"memory.limit_in_bytes": "4096\n", "memory.usage_in_bytes": "5000\n"},
    )
    assert memory_headroom(proc, tmp_path / "cg").bytes == 0
