"""What a cpu_service sends to an engine over the grpc transport: a lying one ends the session, and
nothing else."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from google.protobuf.message import DecodeError

from gpu_service.offload.grpc_tier import GrpcAttachment, GrpcHostTier, GrpcTransport
from gpu_service.offload.host_tier import HostTierStalled, HostTierState
from gpu_service.offload.keeper import View
from gpu_service.offload.shape import HostShape, HostTierOptions
from kernels.cpu import DType
from protos.neo.v1 import cpu_attention_pb2 as pb
from tests.fuzz.target import Finding, Target

_CUT = b"\xff\xfe|"
_SHAPE = HostShape(1, 2, 1, 16, 16, DType.FLOAT32, DType.FLOAT32, 0.25)
_OPTIONS = HostTierOptions(
    address="", blocks=4, max_rows=2, max_blocks_per_row=2, deadline_seconds=0.0
)
_ROWS = torch.zeros(2, 2, 16)


class _Peer:
    """Answers whatever was sent with the next of its messages."""

    def __init__(self, transport: GrpcTransport, answers: list[bytes]) -> None:
        self._transport = transport
        self._answers = deque(answers)

    def send(self, request: pb.AttendRequest, timeout: float) -> None:
        while self._answers:
            try:
                response = pb.AttendResponse.FromString(self._answers.popleft())
            except DecodeError:
                continue  # gRPC ends the stream
            if response.WhichOneof("message") in ("kv_data", "result", "step_error"):
                self._transport.on_tensor(response)

    def cancel(self) -> None:
        pass


class _Keeper:
    def __init__(self, view: View) -> None:
        self.view = view
        self.stats = pb.SessionStats()

    def fail(self, attachment: Any, reason: str) -> None:
        attachment.interrupt()


def _tier(answers: list[bytes]) -> GrpcHostTier:
    """Without a connection: `_Peer` stands for it."""
    tier = GrpcHostTier.__new__(GrpcHostTier)
    transport = GrpcTransport()
    peer: Any = _Peer(transport, answers)
    attachment, _ = transport.attach(pb.SessionOpened(), peer, 1)
    assert isinstance(attachment, GrpcAttachment)
    tier._shape, tier._options = _SHAPE, _OPTIONS
    tier._dtype, tier._state = torch.float32, HostTierState.UP
    tier._sweep, tier._calls, tier._lanes, tier._chunk_tokens = 0, 0, [], 8
    tier._view = View(HostTierState.UP, attachment, 1, False)
    keeper: Any = _Keeper(tier._view)
    tier._keeper = keeper
    return tier


def _one(data: bytes) -> None:
    import numpy as np

    from gpu_service.offload.host_tier import HostRows

    tier = _tier(data.split(_CUT))
    try:
        rows = HostRows(np.array([3, 20], np.int32), np.array([[0, 1], [2, 3]], np.int32))
        tier.begin_sweep([rows])
        tier.submit(0, 0, _ROWS, _ROWS[:, :1], _ROWS[:, :1])
        out = torch.empty_like(_ROWS)
        tier.wait(0, 0, out)
        tier.write_kv(0, torch.tensor([1, 2]), _ROWS[:, :1], _ROWS[:, :1])
        k, v = tier.read_kv(0, torch.tensor([1, 2]))
        if k.shape != (2, 1, 16) or v.shape != (2, 1, 16):
            raise Finding(f"read {k.shape}, {v.shape}")
    except HostTierStalled:
        return


def seeds() -> list[bytes]:
    row = bytes(64)
    result = pb.AttendResult(sweep=1, o=row * 4)
    messages = [
        pb.AttendResponse(result=result),
        pb.AttendResponse(kv_data=pb.KvData(call_id=1)),
        pb.AttendResponse(kv_data=pb.KvData(call_id=2, k=row * 2, v=row * 2)),
        pb.AttendResponse(step_error=pb.StepError(sweep=1, message="no")),
    ]
    parts = [message.SerializeToString() for message in messages]
    return [_CUT.join(parts[:3]), parts[0], parts[3]]


TARGET = Target("cpu_answers", _one, seeds, "wire", (_CUT,))
