"""The session table without a server: nothing stays behind of what could not be opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cpu_service import sessions
from cpu_service.config import CpuServiceConfig
from cpu_service.epoch import ThreadPlan
from cpu_service.sessions import SessionTable
from kernels.cpu import LAYOUT_VERSION
from neo_common.errors import Reason, ServiceError
from neo_common.shm.handoff import HandoffServer
from neo_common.shm.memory import boot_id
from protos.neo.v1 import cpu_attention_pb2 as pb


def opening(transport: pb.Transport) -> pb.OpenSession:
    shape = pb.AttentionShape(
        layers=2, query_heads=4, kv_heads=2, head_dim=32, block_tokens=16, scale=1.0,
        kv_dtype=pb.KV_DTYPE_FLOAT32, activation_dtype=pb.KV_DTYPE_FLOAT32,
    )  # fmt: skip
    return pb.OpenSession(
        session_id=os.urandom(16).hex(), epoch=1, shape=shape, host_blocks=8, max_rows=4,
        max_blocks_per_row=4, transport=transport, lease_seconds=1.0,
        layout_version=LAYOUT_VERSION, boot_id=boot_id(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ShmEpoch", "GrpcEpoch"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(12, "Cannot allocate memory"), Reason.OUT_OF_HOST_MEMORY),
        (RuntimeError("can't start new thread"), Reason.OUT_OF_HOST_MEMORY),
        (KeyError("a bug"), None),
    ],
)
async def test_a_session_without_an_epoch_is_not_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    error: Exception,
    reason: Reason | None,
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sessions, kind, failing)
    table = SessionTable(CpuServiceConfig(), HandoffServer(tmp_path), ThreadPlan(1, (), 20))
    transport = pb.TRANSPORT_SHM if kind == "ShmEpoch" else pb.TRANSPORT_GRPC
    with pytest.raises((ServiceError, KeyError)) as caught:
        await table.open(opening(transport))
    assert getattr(caught.value, "reason", None) == reason
    assert len(table) == 0
    assert table.budget.used_bytes == 0
    await table.drain(grace_seconds=1.0)
