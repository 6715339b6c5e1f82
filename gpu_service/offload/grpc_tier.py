"""The host tier with tensors inline in the stream: slow, and correct anywhere, on another machine
too."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from gpu_service.offload.host_tier import HostRows, HostTierState
from gpu_service.offload.keeper import Attachment, View
from gpu_service.offload.link import Link, LinkBroken
from gpu_service.offload.session_tier import SessionTier
from gpu_service.offload.shape import HostShape, HostTierOptions
from protos.neo.v1 import cpu_attention_pb2 as pb

_CHUNK_BYTES = 2 << 20


def _to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()


class MailboxBroken(Exception):
    """The step failed or the connection is over; the text says why."""


class Mailbox:
    """Answers that came in, by key; one per attachment. The reader's thread puts, the engine's
    takes."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._answers: dict[object, pb.AttendResponse] = {}
        self._wanted: set[object] = set()
        self._broken: str | None = None

    def want(self, key: object) -> None:
        """Announce what will be taken; other answers are dropped, so that a lying peer fills no
        memory."""
        with self._ready:
            self._wanted.add(key)

    def put(self, key: object, response: pb.AttendResponse) -> None:
        with self._ready:
            if key in self._wanted:
                self._answers[key] = response
                self._ready.notify_all()

    def break_off(self, reason: str) -> None:
        with self._ready:
            self._broken = self._broken or reason
            self._ready.notify_all()

    def take(self, key: object, timeout: float) -> pb.AttendResponse | None:
        """The answer; None when it did not come in time. Raises MailboxBroken."""
        with self._ready:
            self._ready.wait_for(lambda: key in self._answers or self._broken is not None, timeout)
            self._wanted.discard(key)
            if key in self._answers:
                return self._answers.pop(key)
            if self._broken is not None:
                raise MailboxBroken(self._broken)
            return None

    def clear(self) -> None:
        with self._ready:
            self._wanted.clear()
            self._answers.clear()


class GrpcAttachment:
    def __init__(self, epoch: int, link: Link, mailbox: Mailbox) -> None:
        self.epoch = epoch
        self.link = link
        self.mailbox = mailbox

    def tether_fd(self) -> int | None:
        return None

    def quiet(self) -> bool:
        """Nothing is shared: the service ends the old epoch before it opens the next."""
        return True

    def interrupt(self) -> None:
        self.mailbox.break_off("the cpu_service has gone")

    def release(self) -> None:
        """Nothing is held."""


class GrpcTransport:
    code = pb.TRANSPORT_GRPC

    def __init__(self) -> None:
        self._mailbox = Mailbox()

    def attach(self, opened: pb.SessionOpened, link: Link, epoch: int) -> tuple[Attachment, bytes]:
        self._mailbox = Mailbox()
        return GrpcAttachment(epoch, link, self._mailbox), b""

    def forget(self) -> None:
        """The pool is the service's."""

    def on_tensor(self, response: pb.AttendResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "result":
            result = response.result
            self._mailbox.put((result.sweep, result.lane, result.layer), response)
        elif kind == "kv_data":
            self._mailbox.put(response.kv_data.call_id, response)
        else:
            self._mailbox.break_off(response.step_error.message)


class GrpcHostTier(SessionTier):
    """HostTier over gRPC messages. See host_tier.HostTier for the calls."""

    mapped_pool = None
    defers = False

    def __init__(self, shape: HostShape, options: HostTierOptions) -> None:
        self._sweep = 0
        self._calls = 0
        self._lanes: list[tuple[list[int], list[int]]] = []  # per lane: lengths, ragged block ids
        token_bytes = 2 * shape.step(1, 1).kv_row_bytes
        self._chunk_tokens = max(_CHUNK_BYTES // token_bytes, 1)
        super().__init__(shape, options, GrpcTransport())

    def _take_over(self, view: View) -> None:
        self._lanes = []

    def _let_go(self) -> None:
        self._lanes = []

    def _attached(self) -> GrpcAttachment:
        attachment = self._require_up()
        assert isinstance(attachment, GrpcAttachment)
        return attachment

    def _send(self, request: pb.AttendRequest) -> None:
        try:
            self._attached().link.send(request, self._options.deadline_seconds)
        except LinkBroken as broken:
            self._stall(str(broken))

    def _take(self, key: object) -> pb.AttendResponse:
        try:
            answer = self._attached().mailbox.take(key, self._options.deadline_seconds)
        except MailboxBroken as broken:
            self._stall(str(broken))
        if answer is None:
            self._stall(
                f"the cpu_service did not answer within {self._options.deadline_seconds:g} s"
            )
        return answer

    def _tensor(self, data: bytes, shape: tuple[int, int, int]) -> torch.Tensor:
        expected = int(np.prod(shape)) * self._dtype.itemsize
        if len(data) != expected:
            self._stall(f"the cpu_service sent {len(data)} bytes instead of {expected}")
        if expected == 0:
            return torch.empty(shape, dtype=self._dtype)
        return torch.frombuffer(bytearray(data), dtype=self._dtype).view(shape)

    def write_kv(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._check_tensor(k, "k")
        self._check_tensor(v, "v")
        for start in range(0, len(slots), self._chunk_tokens):
            part = slice(start, start + self._chunk_tokens)
            write = pb.WriteKv(
                layer=layer, slots=slots[part].tolist(), k=_to_bytes(k[part]), v=_to_bytes(v[part])
            )
            self._send(pb.AttendRequest(write_kv=write))
        if len(slots):
            # Messages are served in order, so the answer to an empty read says that all is stored;
            # else a cut connection could lose writes that the engine believes in.
            self._read(layer, [])

    def _read(self, layer: int, slots: list[int]) -> pb.KvData:
        self._calls += 1
        self._attached().mailbox.want(self._calls)
        read = pb.ReadKv(layer=layer, slots=slots, call_id=self._calls)
        self._send(pb.AttendRequest(read_kv=read))
        return self._take(self._calls).kv_data

    def read_kv(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads, dim = self._shape.kv_heads, self._shape.head_dim
        parts = []
        for start in range(0, len(slots), self._chunk_tokens):
            wanted = slots[start : start + self._chunk_tokens].tolist()
            data = self._read(layer, wanted)
            shape = (len(wanted), heads, dim)
            parts.append((self._tensor(data.k, shape), self._tensor(data.v, shape)))
        if not parts:
            empty = torch.empty((0, heads, dim), dtype=self._dtype)
            return empty, empty.clone()
        return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])

    def begin_sweep(self, lanes: Sequence[HostRows]) -> int:
        attachment = self._attached()
        self._sweep += 1
        attachment.mailbox.clear()
        self._lanes = []
        for rows in lanes:
            lengths = np.asarray(rows.lengths, np.int64)
            used = -(-lengths // self._shape.block_tokens)
            if len(lengths) and (lengths.min() < 1 or used.max() > rows.block_tables.shape[1]):
                raise ValueError("lengths are not between 1 and what the block tables hold")
            mask = np.arange(rows.block_tables.shape[1]) < used[:, None]
            ids = rows.block_tables[mask]
            if len(ids) and (ids.min() < 0 or ids.max() >= self.blocks):
                raise ValueError("a block id is outside the host pool")
            self._lanes.append((lengths.tolist(), ids.tolist()))
        return self._sweep

    def submit(
        self, lane: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self._check_tensor(q, "q")
        attachment = self._attached()
        lengths, block_ids = self._lanes[lane]
        attachment.mailbox.want((self._sweep, lane, layer))
        step = pb.AttendStep(
            sweep=self._sweep,
            layer=layer,
            lane=lane,
            lengths=lengths,
            block_ids=block_ids,
            q=_to_bytes(q),
            k=_to_bytes(k),
            v=_to_bytes(v),
        )
        self._send(pb.AttendRequest(step=step))

    def wait(self, lane: int, layer: int, out: torch.Tensor, back: int = 0) -> None:
        assert not back, "a new sweep drops what is left of the one before"
        result = self._take((self._sweep, lane, layer)).result
        out.copy_(self._tensor(result.o, (out.shape[0], out.shape[1], out.shape[2])))

    def cancel_sweep(self) -> None:
        """Later messages on the stream come after what is in work, so there is nothing to wait
        for."""
        if self._state is HostTierState.UP:
            self._attached().mailbox.clear()
        self._lanes = []
