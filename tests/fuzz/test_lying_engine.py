"""A lying engine against a live cpu_service that serves an honest one, too: at worst the liar's own
session ends."""

from __future__ import annotations

import ctypes
import platform
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from gpu_service.offload.host_tier import HostTierStalled, HostTierState
from gpu_service.offload.shm_tier import ShmAttachment, ShmHostTier
from tests.support.dataplane import rig
from tests.support.offload import Mirror, cpu_service, open_tier, poll_until
from tests.support.stack import Service

LINE = 16
WORKER_BELL = 2 * LINE + 3
"""Words of the control memory; see kernels/cpu/csrc/dataplane.hpp."""
PUBLISHED = 2 * LINE
_FUTEX = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT = 0
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with cpu_service(tmp_path_factory.mktemp("cpu")) as running:
        yield running


def control_of(tier: Any) -> np.ndarray:
    """The words that the liar shares with the service."""
    assert isinstance(tier, ShmHostTier)
    attachment = tier._view.attachment
    assert isinstance(attachment, ShmAttachment)
    place, size = attachment.memory.addresses[1]
    return np.frombuffer((ctypes.c_char * size).from_address(place), np.uint32)


def lie(words: np.ndarray, kind: str, dice: random.Random) -> None:
    match kind:
        case "far ahead":
            words[PUBLISHED] = (int(words[PUBLISHED]) + 1000) % 2**32
        case "behind":
            words[PUBLISHED] = (int(words[PUBLISHED]) - 3) % 2**32
        case "all ones":
            words[PUBLISHED:] = 2**32 - 1
        case "zeros":
            words[PUBLISHED:] = 0
        case "header":
            words[:PUBLISHED] = 0x41414141
        case _:
            for _ in range(2000):
                words[dice.randrange(len(words))] = dice.choice((0, 1, 2**31, 2**32 - 1, 77))


@pytest.mark.parametrize("kind", ["far ahead", "behind", "all ones", "zeros", "header", "noise"])
def test_the_honest_session_goes_on(service: Service, kind: str) -> None:
    honest = Mirror.make()
    dice = random.Random(kind)
    with open_tier(service.address) as good:
        honest.fill(good)
        with open_tier(service.address, deadline_seconds=0.2) as bad:
            words = control_of(bad)
            liar = Mirror.make(seed=5)
            for _ in range(4):
                with suppress(HostTierStalled, AssertionError):
                    bad.poll()
                    if bad.state is HostTierState.UP:
                        words = control_of(bad)
                        bad.begin_sweep([liar.rows([20, 33])])
                        lie(words, kind, dice)
                        q, k = liar.normal(2, 6, 32), liar.normal(2, 2, 32)
                        for layer in range(liar.shape.layers):
                            bad.submit(0, layer, q, k, k)
                            lie(words, kind, dice)
                        bad.wait(0, 0, q)
                honest.sweep(good, honest.rows([16, 17, 95]))
        honest.check_contents(good)
    assert good.state is HostTierState.OFF


def test_a_session_after_the_lie(service: Service) -> None:
    """The liar itself comes back, and gets right answers again when it is honest."""
    mirror = Mirror.make()
    with open_tier(service.address, deadline_seconds=0.5) as tier:
        tier.begin_sweep([mirror.rows([20])])
        lie(control_of(tier), "all ones", random.Random(1))
        assert isinstance(tier, ShmHostTier)
        tier.give_up("the test has lied")
        poll_until(tier, HostTierState.UP, seconds=60)
        mirror.fill(tier)
        mirror.sweep(tier, mirror.rows([16, 17]))


def futex_wait(address: int, expected: int) -> None:
    _libc.syscall(
        _FUTEX[platform.machine()], ctypes.c_void_p(address), _FUTEX_WAIT, ctypes.c_uint(expected),
        None, None, 0,
    )  # fmt: skip


@pytest.mark.skipif(platform.machine() not in _FUTEX, reason="a futex's system call is not known")
def test_an_engine_that_steals_the_workers_wake_does_not_keep_it_from_ending() -> None:
    """Whoever began to wait first is woken first: the service then waited for the worker for ever,
    and with it every session that was to open or to end."""
    with rig() as it:
        it.sweep(it.rows([5]))
        bell = np.frombuffer(it.control, np.uint32)[WORKER_BELL : WORKER_BELL + 1]
        it.worker.stop()
        it.control[:] = bytes(len(it.control))
        it.memory.format(1, bytes(16))
        place = it.memory.addresses[1][0] + 4 * WORKER_BELL
        over = threading.Event()

        def thief() -> None:
            while not over.is_set():
                futex_wait(place, 0)
                bell[0] = 0  # and what the bell said is taken back

        thieves = [threading.Thread(target=thief, daemon=True) for _ in range(3)]
        for thread in thieves:
            thread.start()
        it.worker = type(it.worker)(it.memory, it.pool_memory, it.options)
        it.worker.start()
        while it.worker.stats().parks == 0:
            time.sleep(0.001)
        stopping = threading.Thread(target=it.worker.stop, daemon=True)
        stopping.start()
        stopping.join(60)
        ended = not stopping.is_alive()
        over.set()
        bell[0] = 1
        while any(thread.is_alive() for thread in thieves):
            _libc.syscall(_FUTEX[platform.machine()], ctypes.c_void_p(place), 1, 100, None, None, 0)
        assert ended
