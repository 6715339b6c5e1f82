"""A cpu_service of this process that says what a test wants: real gRPC, a real handoff socket, real
memory files."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from kernels.cpu.dataplane import NONCE_BYTES, StepMemory
from neo_common.shm.memory import SharedMemory
from protos.neo.v1 import cpu_attention_pb2 as pb
from protos.neo.v1 import cpu_attention_pb2_grpc as pb_grpc
from tests.support.offload import BLOCKS, MAX_ROWS, SHAPE

NONCE = bytes(range(NONCE_BYTES))
STEP = SHAPE.step(MAX_ROWS, 6)
LINE = 16
RETIRED = 3 * LINE + 5
"""Words of the control memory; see kernels/cpu/csrc/dataplane.hpp."""
STATE, ERROR = 3 * LINE, 3 * LINE + 1
BELLS = 4 * LINE


@dataclass
class Lie:
    """What is other than it should be."""

    path: Callable[[Path], str] = str
    """Where the handoff socket is said to be."""
    descriptors: Callable[[list[int]], Sequence[int]] = list
    """Those handed over, of control, step and pool."""
    answers: bool = True
    """On the handoff socket."""
    accepted: bytes = b"\0"
    control: Callable[[np.ndarray], None] = lambda words: None
    """What is done to the control memory's words before it is handed over."""
    first: pb.AttendResponse | None = None
    """Instead of what was opened."""
    ready: bool = True
    after: Callable[[Liar], Iterator[pb.AttendResponse]] = lambda liar: iter(())
    """Sent once the session is up."""


class Liar(pb_grpc.CpuAttentionServiceServicer):
    def __init__(self, folder: Path, lie: Lie) -> None:
        self.lie = lie
        self.path = folder / "handoff"
        sizes = (*STEP.sizes(), SHAPE.layout.pool_bytes(BLOCKS))
        self.parts = [SharedMemory.create("liar", size) for size in sizes]
        self.words = np.frombuffer(self.parts[0].buffer, np.uint32)
        self.over = threading.Event()
        self.held: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._hand_over, daemon=True)
        self._thread.start()

    def Attend(
        self, requests: Iterator[pb.AttendRequest], context: Any
    ) -> Iterator[pb.AttendResponse]:
        opening = next(requests).open
        if self.lie.first is not None:
            yield self.lie.first
            return
        memory = StepMemory(STEP, self.parts[0].buffer, self.parts[1].buffer)
        memory.format(opening.epoch, NONCE)
        self.lie.control(self.words)
        opened = pb.SessionOpened(
            transport=opening.transport, handoff_socket=self.lie.path(self.path),
            handoff_token=bytes(32), nonce=NONCE, resumed=opening.resume,
        )  # fmt: skip
        yield pb.AttendResponse(opened=opened)
        for request in requests:
            kind = request.WhichOneof("message")
            if kind == "mapped" and self.lie.ready:
                yield pb.AttendResponse(ready=pb.Heartbeat())
                yield from self.lie.after(self)
            elif kind == "heartbeat":
                stats = pb.SessionStats(sequence=request.heartbeat.sequence)
                yield pb.AttendResponse(stats=stats)
            elif kind == "close":
                yield pb.AttendResponse(closed=pb.SessionClosed())
                return

    def _hand_over(self) -> None:
        while not self.over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.held.append(connection)
            if not self.lie.answers:
                continue
            with suppress(OSError):
                _, ancillary, _, _ = connection.recvmsg(1024, 1024)
                for _, _, payload in ancillary:
                    for fd in array.array("i", payload):
                        os.close(fd)
                # As the service does: a pool that the engine holds is not handed over again.
                offered = [part.fd for part in self.parts][: 2 if ancillary else 3]
                given = self.lie.descriptors(offered)
                socket.send_fds(connection, [self.lie.accepted], list(given))

    def close(self) -> None:
        self.over.set()
        # Closing a socket wakes nobody who waits in it.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (self._listener, *self.held):
            each.close()
        del self.words
        for part in self.parts:
            part.close()


@dataclass
class Running:
    liar: Liar
    address: str
    server: Any = field(repr=False, default=None)


@contextmanager
def liar(folder: Path, lie: Lie) -> Iterator[Running]:
    servicer = Liar(folder, lie)
    server = grpc.server(ThreadPoolExecutor(8))
    pb_grpc.add_CpuAttentionServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Running(servicer, f"127.0.0.1:{port}")
    finally:
        servicer.over.set()
        server.stop(None).wait()
        servicer.close()
