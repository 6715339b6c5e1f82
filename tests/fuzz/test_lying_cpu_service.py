"""A lying cpu_service against an engine: at worst there is no host tier, said in one sentence, in
time, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_service.offload import shm_tier
from gpu_service.offload.host_tier import HostTierStalled, HostTierState
from gpu_service.offload.keeper import HostTierUnavailable
from gpu_service.offload.link import MAX_CONTROL, Link
from kernels.cpu.dataplane import WorkerError
from neo_common.shm.memory import SharedMemory
from protos.neo.v1 import cpu_attention_pb2 as pb
from tests.fuzz.liar import BELLS, ERROR, LINE, RETIRED, STATE, Liar, Lie, liar
from tests.support.offload import SHAPE, Mirror, open_descriptors, open_tier

EVER = 60.0


@pytest.fixture(autouse=True)
def short_handoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_tier, "_HANDOFF_SECONDS", 0.3)


def swapped(words: Any) -> None:
    words[:] = words[::-1].copy()


def word(place: int, value: int) -> Callable[[np.ndarray], None]:
    def write(words: np.ndarray) -> None:
        words[place] = value

    return write


def instead(index: int, make: Callable[[], int]) -> Callable[[list[int]], list[int]]:
    made = make()
    return lambda fds: [made if i == index else fd for i, fd in enumerate(fds)]


def unsealed() -> int:
    fd = os.memfd_create("liar", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 20)
    return fd


def other_size() -> int:
    return os.dup(SharedMemory.create("liar", 1 << 20).fd)


def no_memory() -> int:
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


LIES: dict[str, Callable[[], Lie]] = {
    "no such socket": lambda: Lie(path=lambda path: str(path) + "-not"),
    "a path that is too long": lambda: Lie(path=lambda path: "/" + "x" * 300),
    "a folder": lambda: Lie(path=lambda path: str(path.parent)),
    "a socket that never answers": lambda: Lie(answers=False),
    "a refusal that is no text": lambda: Lie(accepted=b"\1\xff\xfe", descriptors=lambda fds: fds),
    "an empty answer": lambda: Lie(accepted=b"\2"),
    "no descriptors": lambda: Lie(descriptors=lambda fds: []),
    "too few": lambda: Lie(descriptors=lambda fds: fds[:2]),
    "too many": lambda: Lie(descriptors=lambda fds: [*fds, fds[0]]),
    "far too many": lambda: Lie(descriptors=lambda fds: fds * 5),
    "in another order": lambda: Lie(descriptors=lambda fds: fds[::-1]),
    "control of another size": lambda: Lie(descriptors=instead(0, other_size)),
    "step of another size": lambda: Lie(descriptors=instead(1, other_size)),
    "pool of another size": lambda: Lie(descriptors=instead(2, other_size)),
    "control that can shrink": lambda: Lie(descriptors=instead(0, unsealed)),
    "pool that can shrink": lambda: Lie(descriptors=instead(2, unsealed)),
    "pool that is no memory": lambda: Lie(descriptors=instead(2, no_memory)),
    "control without its magic": lambda: Lie(control=word(0, 0)),
    "control of another layout": lambda: Lie(control=word(2, 2**32 - 1)),
    "control of another epoch": lambda: Lie(control=word(4, 99)),
    "control of another shape": lambda: Lie(control=word(6, 64)),
    "control with another nonce": lambda: Lie(control=word(10, 7)),
    "control from end to beginning": lambda: Lie(control=swapped),
    "another first message": lambda: Lie(first=pb.AttendResponse(stats=pb.SessionStats())),
    "a tensor first": lambda: Lie(first=pb.AttendResponse(result=pb.AttendResult(o=b"x"))),
    "nothing first": lambda: Lie(first=pb.AttendResponse()),
    "never ready": lambda: Lie(ready=False),
}


@pytest.mark.parametrize("name", LIES, ids=lambda name: name.replace(" ", "-"))
def test_an_opening_that_lies_is_one_sentence(tmp_path: Path, name: str) -> None:
    with liar(tmp_path, LIES[name]()) as running:
        begin, before = time.monotonic(), open_descriptors(os.getpid())
        with (
            pytest.raises(HostTierUnavailable, match=r"cannot be used: .+") as caught,
            open_tier(running.address, open_seconds=0.7),
        ):
            pass
        assert len(str(caught.value).splitlines()) == 1
        assert time.monotonic() - begin < EVER
        for held in running.liar.held:
            held.close()
        del caught
        # Of gRPC's own, some are closed a little later; mappings in cycles, when those are found.
        while open_descriptors(os.getpid()) > before and time.monotonic() - begin < EVER:
            gc.collect()
            time.sleep(0.01)
        assert open_descriptors(os.getpid()) <= before


def test_an_honest_opening_is_taken(tmp_path: Path) -> None:
    """What the others are measured against."""
    with liar(tmp_path, Lie()) as running, open_tier(running.address) as tier:
        assert tier.state is HostTierState.UP


def sweep(tier: Any, mirror: Mirror) -> torch.Tensor:
    """What comes out for one row in the first layer."""
    tier.begin_sweep([mirror.rows([20])])
    q, k = mirror.normal(1, 6, 32), mirror.normal(1, 2, 32)
    tier.submit(0, 0, q, k, k)
    out = torch.zeros_like(q)
    tier.wait(0, 0, out)
    return out


def test_done_long_before_it_is_gives_what_stands_there(tmp_path: Path) -> None:
    """NaN: the engine ends those requests, and reads nothing else than the slot."""
    with liar(tmp_path, Lie()) as running, open_tier(running.address) as tier:
        running.liar.parts[1].buffer[:] = b"\xff" * len(running.liar.parts[1].buffer)
        running.liar.words[BELLS + LINE] = 2**31 - 1
        assert sweep(tier, Mirror.make()).isnan().all()


@pytest.mark.parametrize("ahead", [2**31 - 1, 2**31, 2**31 + 2, 2**32 - 1])
def test_counters_that_go_wherever_they_like(tmp_path: Path, ahead: int) -> None:
    """Each call ends within its deadline, by a result or a stall."""
    with liar(tmp_path, Lie()) as running, open_tier(running.address, deadline_seconds=0.2) as tier:
        words = running.liar.words
        words[RETIRED : RETIRED + 2] = ahead
        words[BELLS:][: 2 * SHAPE.layers * 2 * LINE] = ahead
        begin = time.monotonic()
        for _ in range(5):
            with suppress(HostTierStalled):
                sweep(tier, Mirror.make())
                tier.cancel_sweep()
        assert time.monotonic() - begin < EVER


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [(ERROR, 2**32 - 1, "INTERNAL"), (ERROR, 1, "BAD_RECORD"), (STATE, 2, "NONE")],
)
def test_a_worker_that_says_anything_is_a_stall(
    tmp_path: Path, place: int, value: int, words: str
) -> None:
    with liar(tmp_path, Lie()) as running, open_tier(running.address) as tier:
        running.liar.words[place] = value
        with pytest.raises(HostTierStalled, match=f"the cpu_service's worker stopped: {words}"):
            sweep(tier, Mirror.make())
        assert WorkerError[words] in list(WorkerError)
        assert tier.state is HostTierState.DEGRADED


def flood(served: Liar) -> Iterator[pb.AttendResponse]:
    while not served.over.is_set():
        yield pb.AttendResponse(stats=pb.SessionStats(busy_seconds=1.0))


def test_a_service_that_talks_without_end_fills_no_memory(tmp_path: Path) -> None:
    """Nobody takes what it says here: the stream ends."""
    with liar(tmp_path, Lie(after=flood)) as running:
        link = Link(running.address, lambda response: None, lambda: None)
        link.send(pb.AttendRequest(open=pb.OpenSession(epoch=1)), EVER)
        link.send(pb.AttendRequest(mapped=pb.MemoryMapped()), EVER)
        end = time.monotonic() + EVER
        while not link.over and link._control.qsize() <= MAX_CONTROL and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.05)
        assert link._control.qsize() <= MAX_CONTROL + 1
        link.close()


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
def test_figures_that_cannot_be_are_not_taken(tmp_path: Path, seconds: float) -> None:
    """A NaN among the host's rates would have stayed in all predictions."""

    def figures(served: Liar) -> Iterator[pb.AttendResponse]:
        yield pb.AttendResponse(stats=pb.SessionStats(busy_seconds=1.0))
        yield pb.AttendResponse(stats=pb.SessionStats(busy_seconds=seconds))

    with liar(tmp_path, Lie(after=figures)) as running, open_tier(running.address) as tier:
        seen, end = set(), time.monotonic() + EVER
        while tier.stats.sequence == 0 and time.monotonic() < end:  # until the next heartbeat
            seen.add(tier.work.busy_seconds)
            time.sleep(0.0005)
        assert tier.stats.sequence > 0
        assert 1.0 in seen
        assert seen <= {0.0, 1.0}
