"""What a backend says to a router: its load, of which every policy must make a choice, and the
details of failures."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from neo_common.errors import ErrorDetails, Reason, ServiceError, reason_of
from protos.neo.v1 import engine_pb2 as pb
from router.backend import load_view
from router.policies import POLICIES, choose
from router.views import BackendState, BackendView, CallView
from tests.fuzz.target import Finding, Target

_HONEST = BackendView("honest", BackendState.UP, None)


def _one(data: bytes) -> None:
    if data[:1] == b"d":
        reason_of(data[1:])
        details = ErrorDetails(_Failed(data[1:]))
        if details.retry_after is not None:
            float(details.retry_after)
        return
    try:
        load = pb.LoadSnapshot.FromString(data[1:])
    except DecodeError:
        return
    view = BackendView("lying", BackendState.UP, load_view(load), age_seconds=0.5)
    call = CallView(prompt_tokens=100, session=b"s", prefix=(b"p",), known=("",))
    for name, policy in POLICIES.items():
        chosen = choose(policy, [view, _HONEST], call)
        if chosen not in ("lying", "honest"):
            raise Finding(f"{name} chose {chosen!r}")


class _Failed:
    def __init__(self, details: bytes) -> None:
        self._details = details

    def trailing_metadata(self) -> Any:
        return (("grpc-status-details-bin", self._details),)


def seeds() -> list[bytes]:
    tier = pb.TierLoad(
        total_blocks=100, free_blocks=20, running_requests=3, freed_tokens_per_second=500.0,
        token_seconds=0.02,
    )  # fmt: skip
    load = pb.LoadSnapshot(
        state=pb.ENGINE_STATE_SERVING, gpu=tier, host=tier, waiting_requests=2, block_tokens=16,
        waiting_prompt_tokens=900, max_waiting_requests=10, prompt_tokens_per_second=9000.0,
    )  # fmt: skip
    error = ServiceError(Reason.QUEUE_FULL, "full", field="a", retry_after=1.5)
    status: Any = error.to_status()
    return [b"l" + load.SerializeToString(), b"d" + status.trailing_metadata[0][1]]


TARGET = Target("backend_reports", _one, seeds, "wire", smoke=300)
