"""Packets and descriptors on the handoff socket, in both directions.

data[0] even: an engine's packet to the server;  odd: a server's reply to the engine
data[1]: kinds of descriptors that go along, two bits each; data[2:]: the packet
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from neo_common.shm import handoff
from neo_common.shm.memory import SharedMemory
from tests.fuzz.front import loop
from tests.fuzz.target import Finding, Target

TOKEN = b"t" * handoff.TOKEN_BYTES
SIZE = 8192


@cache
def _descriptors() -> list[int]:
    unsealed = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    os.ftruncate(unsealed, SIZE)
    sealed = SharedMemory.create("fuzz", SIZE)
    _KEEP.append(sealed)
    short = SharedMemory.create("fuzz", 4096)
    _KEEP.append(short)
    return [sealed.fd, short.fd, unsealed, os.open("/dev/null", os.O_RDWR)]


_KEEP: list[SharedMemory] = []


def _open() -> int:
    return len(os.listdir("/proc/self/fd"))


def _take(given: list[int]) -> Sequence[int]:
    for extra in given[1:]:
        os.close(extra)
    if given:
        SharedMemory.adopt(given[0], SIZE).close()
    return [_descriptors()[0]]


def _one(data: bytes) -> None:
    data = data.ljust(2, b"\0")
    chosen = [_descriptors()[data[1] >> shift & 3] for shift in (0, 2, 4, 6)][: data[0] % 6]
    _descriptors(), loop()  # which are opened once
    before = _open()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setblocking(False)
        ours.settimeout(1.0)
        socket.send_fds(ours, [data[2:1500] or b"\0"], chosen)
        if data[0] % 2:
            _reply(theirs)
        else:
            _packet(theirs)
    if _open() != before:
        raise Finding(f"{_open() - before} descriptors are left open")


def _reply(connection: socket.socket) -> None:
    reply, fds = handoff._receive(connection)
    for fd in fds:
        try:
            SharedMemory.adopt(fd, SIZE).close()
        except ValueError:
            continue
    reply[1:].decode(errors="replace")


def _packet(connection: socket.socket) -> None:
    async def answer() -> None:
        server = handoff.HandoffServer(Path("/nowhere"))
        offer = handoff.Offer(TOKEN, _take, lambda: None)
        server._offers[TOKEN] = offer
        held = socket.socket(fileno=os.dup(connection.fileno()))
        held.setblocking(False)
        timer: Any = loop().call_later(60, lambda: None)
        server._waiting[held] = timer
        server._answer(held)
        offer.end()

    loop().run_until_complete(answer())


def seeds() -> list[bytes]:
    good = handoff._MAGIC + TOKEN
    packets = [bytes([n, kinds]) + good for n in (0, 2, 4) for kinds in (0, 0b1101, 0b11100100)]
    replies = [bytes([n, 0b100100]) + word for n in (1, 3, 5) for word in (b"\0", b"\1no")]
    return packets + replies


TARGET = Target("handoff", _one, seeds, words=(TOKEN, handoff._MAGIC), max_bytes=2048)
