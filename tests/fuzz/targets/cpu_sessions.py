"""What an engine sends to a cpu_service: the opening of a session, then its messages with tensors
inline."""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_service.config import CpuServiceConfig
from cpu_service.epoch import ThreadPlan
from cpu_service.grpc_epoch import GrpcEpoch
from cpu_service.spec import SessionSpec, read_spec
from kernels.cpu import LAYOUT_VERSION
from neo_common.shm.memory import SharedMemory, boot_id
from protos.neo.v1 import cpu_attention_pb2 as pb
from tests.fuzz.front import harness, request_of
from tests.fuzz.target import Finding, Target

SLOTS = 3 * 16
ROW = np.zeros(16, np.float32).tobytes()


def opening() -> pb.OpenSession:
    shape = pb.AttentionShape(
        layers=2, query_heads=2, kv_heads=1, head_dim=16, block_tokens=16,
        kv_dtype=pb.KV_DTYPE_FLOAT32, activation_dtype=pb.KV_DTYPE_FLOAT32, scale=0.25,
        sliding_window=[0, 8],
    )  # fmt: skip
    return pb.OpenSession(
        session_id="0" * 32, epoch=1, shape=shape, host_blocks=3, max_rows=4, max_blocks_per_row=3,
        transport=pb.TRANSPORT_GRPC, lease_seconds=10, layout_version=LAYOUT_VERSION,
        boot_id=boot_id(),
    )  # fmt: skip


@cache
def _epoch() -> tuple[GrpcEpoch, SharedMemory]:
    spec = read_spec(opening(), CpuServiceConfig())
    pool = SharedMemory.create("fuzz", spec.pool_bytes)
    return GrpcEpoch(spec, 1, pool, ThreadPlan(1, (), 0)), pool


def _handle(data: bytes) -> None:
    request = request_of(pb.AttendRequest, data)
    kind = request.WhichOneof("message")
    if kind == "open":
        _bounded(read_spec(request.open, CpuServiceConfig()))
    elif kind in ("step", "write_kv", "read_kv"):
        epoch, pool = _epoch()
        answer = epoch._run(request)
        if answer is not None:
            answer.SerializeToString()
        used = epoch._spec.pool_bytes
        if any(pool.buffer[used:]):
            raise Finding("memory behind the pool was written to")


def _bounded(spec: SessionSpec) -> None:
    if min(spec.pool_bytes, *spec.step.sizes()) <= 0 or spec.pool_bytes >= 2**62:
        raise Finding(f"taken: {spec}")


def seeds() -> list[bytes]:
    step = pb.AttendStep(
        sweep=1, layer=1, lengths=[1, 20], block_ids=[0, 1, 2], q=ROW * 4, k=ROW * 2, v=ROW * 2
    )
    messages = [
        pb.AttendRequest(open=opening()),
        pb.AttendRequest(step=step),
        pb.AttendRequest(write_kv=pb.WriteKv(layer=0, slots=[0, SLOTS - 1], k=ROW * 2, v=ROW * 2)),
        pb.AttendRequest(read_kv=pb.ReadKv(layer=1, slots=[3, 4, 5], call_id=7)),
        pb.AttendRequest(heartbeat=pb.Heartbeat(sequence=1)),
    ]
    return [message.SerializeToString() for message in messages]


TARGET = Target("cpu_sessions", harness(_handle), seeds, "wire", (ROW, ROW * 2))
