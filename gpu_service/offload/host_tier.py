"""What the engine core knows of the host tier: one interface, two transports (`shm`, `grpc`).

    sweep = tier.begin_sweep([rows of lane 0, rows of lane 1])      once per iteration
    for layer in layers:
        tier.submit(lane, layer, q, k, v)                           q, k, v leave; the CPU starts
        ...                                                         GPU attention of the other rows
        tier.wait(lane, layer, out)                                 o comes back

A *lane* is an independent queue of layers within one sweep: asymmetric pipelining uses two,
everything else one.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # the scheduler reads `HostTierState` and runs without torch
    import torch

    from kernels.cpu import KvPool


class HostTierState(enum.Enum):
    """OFF: there is none. UP: in use. DEGRADED: the cpu_service is away and its lease has not run
    out; KV is kept. LOST: the KV is gone (restarted without it, or the grpc transport's peer died).
    EXPIRED: it is gone with the lease. Either is seen for one `poll` at least, before the tier is
    UP again with an empty pool."""

    OFF = "off"
    UP = "up"
    DEGRADED = "degraded"
    LOST = "lost"
    EXPIRED = "expired"

    @property
    def is_lost(self) -> bool:
        return self in (HostTierState.LOST, HostTierState.EXPIRED)


class HostTierStalled(Exception):
    """The cpu_service did not answer within the sweep's deadline, or has gone. The sweep's host
    rows are to be dropped and repeated later; nothing that they wrote matters, since appending K
    and V at a position is idempotent."""


@dataclass(frozen=True)
class HostRows:
    """The decode rows of one lane for one sweep.

    lengths: `[rows]` int32, tokens attended, the new one included.
    block_tables: `[rows, width]` int32 host block ids; entries past ceil(length / block_tokens) are
    ignored.
    ranges: `[layers, 2]` int32, from which row to which each layer takes; None: all of them. Only
    for lane 0 of a tier that `defers`.
    """

    lengths: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]
    ranges: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class HostWork:
    """What the cpu_service has computed in this epoch, as it told last, about a second ago at
    most."""

    kv_tokens: float = 0.0
    """Read, a token's K and V in all layers being one."""
    busy_seconds: float = 0.0
    sweeps: int = 0


class HostTier(Protocol):
    """The engine's end of one session with a cpu_service. Not thread-safe: the engine core's thread
    alone calls it.

    Tensors are on the engine's device, contiguous, in the model's dtype. Slots are `block *
    block_tokens + offset`.
    """

    @property
    def state(self) -> HostTierState: ...

    @property
    def blocks(self) -> int:
        """Size of the host pool in KV blocks."""
        ...

    @property
    def epoch(self) -> int:
        """Counts sessions and resumptions; a change means that sweeps in flight are void."""
        ...

    @property
    def work(self) -> HostWork:
        """Counts from nothing in each epoch."""
        ...

    @property
    def defers(self) -> bool:
        """A layer may take rows of its own, and be waited for a sweep after its submit."""
        ...

    @property
    def mapped_pool(self) -> KvPool | None:
        """The host pool as this process maps it, for copies of whole blocks; None where it cannot
        be reached (grpc) or while the tier is not UP."""
        ...

    def poll(self) -> None:
        """Once per iteration: notice a lost peer, resume, recover. Never blocks.

        `state` goes from LOST to UP here alone, and LOST is seen after at least one `poll`: the
        scheduler must learn that the KV is gone before it may use the new session."""
        ...

    def write_kv(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store `k`, `v` `[tokens, kv_heads, head_dim]` of one layer at `slots` `[tokens]` int64
        (host memory).

        Raises HostTierStalled, also while DEGRADED unless the old peer is known to be dead: until
        then it might still write to blocks of the last sweep."""
        ...

    def read_kv(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V at `slots`, dequantised to the model's dtype. Raises HostTierStalled; shm reads
        while DEGRADED too."""
        ...

    def begin_sweep(self, lanes: Sequence[HostRows]) -> int:
        """Publish the rows of at most two lanes; returns the sweep's number. Raises
        HostTierStalled.

        Every layer of a lane that has rows is to be submitted, in order, or the sweep cancelled."""
        ...

    def submit(
        self, lane: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Start one layer's attention: `q` `[rows, query_heads, head_dim]`, `k`, `v` `[rows,
        kv_heads, head_dim]`, of the rows that take part in it; also where none do."""
        ...

    def wait(self, lane: int, layer: int, out: torch.Tensor, back: int = 0) -> None:
        """Fill `out` `[rows, query_heads, head_dim]` with that layer's result, of this sweep or,
        where the tier `defers`, with `back` 1 of the one before. Raises HostTierStalled."""
        ...

    def cancel_sweep(self) -> None:
        """Drop the rest of the current sweep (the engine failed in the middle of it). When it
        returns, its blocks may be used otherwise. Raises HostTierStalled. Nothing to do after a
        sweep that was waited for to its end."""
        ...

    def close(self) -> None:
        """End the session; its KV is freed on both sides."""
        ...
