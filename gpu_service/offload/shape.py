"""What a session with a cpu_service is opened with."""

from __future__ import annotations

from dataclasses import dataclass, field

from kernels.cpu import DType, KvLayout
from kernels.cpu.dataplane import StepShape
from neo_common.grpc.settings import PeerSettings
from neo_common.model_spec import ModelSpec


@dataclass(frozen=True)
class HostShape:
    """A model's attention as the host tier sees it."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    kv_dtype: DType
    """Of the pool; INT8 is lossy."""
    activation: DType
    """Of q, k, v and o: the model's dtype."""
    scale: float
    sliding_window: tuple[int, ...] = ()
    """Per layer, in tokens; 0 or empty means the whole context."""
    softcap: float = 0.0

    @classmethod
    def of_model(
        cls, spec: ModelSpec, block_tokens: int, activation: DType, kv_dtype: DType
    ) -> HostShape:
        windows = tuple(spec.sliding_window)
        return cls(
            layers=spec.layers,
            query_heads=spec.query_heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            block_tokens=block_tokens,
            kv_dtype=kv_dtype,
            activation=activation,
            scale=spec.head_dim**-0.5,
            sliding_window=windows if any(windows) else (),
        )

    @property
    def layout(self) -> KvLayout:
        return KvLayout(self.layers, self.kv_heads, self.head_dim, self.block_tokens, self.kv_dtype)

    def blocks_in(self, pool_bytes: int) -> int:
        """KV blocks that fit into a pool of that size."""
        return pool_bytes // self.layout.pool_bytes(1)

    def step(self, max_rows: int, max_blocks_per_row: int) -> StepShape:
        return StepShape(
            self.layers,
            self.query_heads,
            self.kv_heads,
            self.head_dim,
            self.block_tokens,
            self.activation,
            max_rows,
            max_blocks_per_row,
        )


@dataclass(frozen=True)
class HostTierOptions:
    """Terms of the session and how the engine waits."""

    address: str
    """gRPC address of the cpu_service."""
    blocks: int
    """Size of the host pool."""
    max_rows: int
    """Rows of one sweep over all lanes."""
    max_blocks_per_row: int
    transport: str = "shm"
    """`shm` or `grpc`."""
    lease_seconds: float = 30.0
    """How long KV is kept while the cpu_service is away."""
    deadline_seconds: float = 2.0
    """How long one wait of a sweep lasts at most."""
    open_seconds: float = 60.0
    """How long the first opening may take."""
    spin_us: int = 50
    """How long a wait spins before it sleeps."""
    peer: PeerSettings = field(default_factory=PeerSettings)
    """TLS and credentials of the connection."""

    def validate(self) -> None:
        """Raises ValueError naming the field."""
        if self.transport not in ("shm", "grpc"):
            raise ValueError(f"offload_transport must be shm or grpc, not {self.transport!r}")
        if not 1 <= self.lease_seconds <= 600:
            raise ValueError("lease_seconds must be between 1 and 600")
        if self.deadline_seconds <= 0:
            raise ValueError("sweep_deadline_ms must be positive")
        if self.blocks < 1:
            raise ValueError("host_kv_gib is smaller than one KV block")
