"""What an engine asks for when it opens a session, checked field by field before anything is
allocated."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

from cpu_service.config import CpuServiceConfig
from kernels.cpu import LAYOUT_VERSION, DType, KvLayout
from kernels.cpu.dataplane import StepShape
from neo_common.errors import Reason, ServiceError
from neo_common.shm.memory import boot_id
from protos.neo.v1 import cpu_attention_pb2 as pb

_MIN_LEASE_SECONDS = 1.0
_MAX_BLOCKS = 1 << 31
_MAX_BLOCKS_PER_ROW = 1 << 20
_MAX_GROUP = 16
_ID_BYTES = 4
# One layer's q, k and v of all rows in one message of the grpc transport.
MAX_INLINE_BYTES = 48 << 20


@dataclass(frozen=True)
class SessionSpec:
    """A session's shape and terms; equal specs (but for the epoch) can share a pool."""

    session_id: str
    layout: KvLayout
    step: StepShape
    blocks: int
    scale: float
    softcap: float
    windows: tuple[int, ...]
    transport: pb.Transport
    lease_seconds: float

    @property
    def pool_bytes(self) -> int:
        return self.layout.pool_bytes(self.blocks)

    @property
    def work_bytes(self) -> int:
        """Beside the pool: shared memory, or, with tensors in messages, the block tables of the
        largest step as they are laid out (a mask of a byte beside each id)."""
        if self.transport == pb.TRANSPORT_SHM:
            return sum(self.step.sizes())
        return self.step.max_rows * self.step.max_blocks_per_row * (_ID_BYTES + 1)


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise ServiceError(Reason.INVALID_ARGUMENT, f"{field} {message}", field=field)


def _shape_fields(shape: pb.AttentionShape) -> None:
    for name, limit in (("layers", 1024), ("query_heads", 1024), ("kv_heads", 1024)):
        value = getattr(shape, name)
        _require(1 <= value <= limit, f"shape.{name}", f"must be between 1 and {limit}")
    _require(
        shape.query_heads % shape.kv_heads == 0,
        "shape.query_heads",
        "must be a multiple of kv_heads",
    )
    _require(
        shape.query_heads <= _MAX_GROUP * shape.kv_heads,
        "shape.query_heads",
        f"must be at most {_MAX_GROUP} times kv_heads",
    )
    _require(
        shape.head_dim % 16 == 0 and 16 <= shape.head_dim <= 256,
        "shape.head_dim",
        "must be a multiple of 16 up to 256",
    )
    _require(shape.block_tokens in (16, 32, 64), "shape.block_tokens", "must be 16, 32 or 64")
    _require(int(shape.kv_dtype) in list(DType), "shape.kv_dtype", "is not a known type")
    _require(
        int(shape.activation_dtype) in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16),
        "shape.activation_dtype",
        "must be float32, bfloat16 or float16",
    )
    _require(math.isfinite(shape.scale) and shape.scale > 0, "shape.scale", "must be positive")
    _require(
        math.isfinite(shape.softcap) and shape.softcap >= 0, "shape.softcap", "must not be negative"
    )
    _require(
        len(shape.sliding_window) in (0, shape.layers),
        "shape.sliding_window",
        "must have one entry per layer, or none",
    )
    _require(
        all(window < 1 << 31 for window in shape.sliding_window),
        "shape.sliding_window",
        "is too large",
    )


def _terms(request: pb.OpenSession, config: CpuServiceConfig) -> None:
    _require(
        len(request.session_id) == 32 and set(request.session_id) <= set(string.hexdigits),
        "session_id",
        "must be 32 hexadecimal digits",
    )
    _require(request.epoch >= 1, "epoch", "must be at least 1")
    _require(
        1 <= request.host_blocks < _MAX_BLOCKS, "host_blocks", "must be between 1 and 2^31 - 1"
    )
    _require(
        1 <= request.max_rows <= config.max_rows,
        "max_rows",
        f"must be between 1 and {config.max_rows}",
    )
    _require(
        1 <= request.max_blocks_per_row <= _MAX_BLOCKS_PER_ROW,
        "max_blocks_per_row",
        f"must be between 1 and {_MAX_BLOCKS_PER_ROW}",
    )
    longest = config.max_lease_seconds
    _require(
        _MIN_LEASE_SECONDS <= request.lease_seconds <= longest,
        "lease_seconds",
        f"must be between {_MIN_LEASE_SECONDS:g} and {longest:g}",
    )
    _require(
        request.transport in (pb.TRANSPORT_SHM, pb.TRANSPORT_GRPC),
        "transport",
        "must be SHM or GRPC",
    )


def _same_machine(request: pb.OpenSession) -> None:
    if request.layout_version != LAYOUT_VERSION:
        raise ServiceError(
            Reason.LAYOUT_MISMATCH,
            f"layout_version {request.layout_version} of the engine is not this cpu_service's "
            f"{LAYOUT_VERSION}; run the same release on both sides",
            field="layout_version",
        )
    if request.transport == pb.TRANSPORT_SHM and request.boot_id != boot_id():
        raise ServiceError(
            Reason.NOT_COLOCATED,
            "boot_id differs: engine and cpu_service are on different machines; "
            "use the grpc transport",
            field="boot_id",
        )


def read_spec(request: pb.OpenSession, config: CpuServiceConfig) -> SessionSpec:
    """Raises ServiceError naming the field."""
    _terms(request, config)
    shape = request.shape
    _shape_fields(shape)
    _same_machine(request)
    try:
        layout = KvLayout(
            shape.layers, shape.kv_heads, shape.head_dim, shape.block_tokens, DType(shape.kv_dtype)
        )
        step = StepShape(
            shape.layers,
            shape.query_heads,
            shape.kv_heads,
            shape.head_dim,
            shape.block_tokens,
            DType(shape.activation_dtype),
            request.max_rows,
            request.max_blocks_per_row,
        )
        step.sizes()
        layout.pool_bytes(request.host_blocks)
    except ValueError as error:
        raise ServiceError(Reason.INVALID_ARGUMENT, f"shape: {error}", field="shape") from error
    row_bytes = 2 * step.query_row_bytes + 2 * step.kv_row_bytes
    _require(
        request.transport == pb.TRANSPORT_SHM or request.max_rows * row_bytes <= MAX_INLINE_BYTES,
        "max_rows",
        "is too large for tensors inline in messages",
    )
    return SessionSpec(
        session_id=request.session_id.lower(),
        layout=layout,
        step=step,
        blocks=request.host_blocks,
        scale=shape.scale,
        softcap=shape.softcap,
        windows=tuple(shape.sliding_window),
        transport=request.transport,
        lease_seconds=request.lease_seconds,
    )
