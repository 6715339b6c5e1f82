"""A plan as what it asks of the device, the host and the link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_service.scheduling.plan import IterationPlan, Migration, Mode, SubBatch, Tier

GPU_ONLY, INLINE, DEFERRED, ASYMMETRIC = "gpu_only", "inline", "deferred", "asymmetric"
WAYS = (GPU_ONLY, INLINE, DEFERRED, ASYMMETRIC)
"""How an iteration may run."""


@dataclass(frozen=True)
class SweepWork:
    """Rows of the dense layers, and KV tokens."""

    way: str
    """One of `WAYS`."""
    decode: float = 0.0
    """Decode rows that attend on the device."""
    chunk_rows: int = 0
    """Rows of prompt chunks."""
    context: float = 0.0
    """Tokens that `decode` attends to."""
    host_rows: float = 0.0
    """Rows of the dense layers whose attention is the host's: DEFERRED, those of one layer."""
    host_tokens: float = 0.0
    """KV tokens that the host reads, all layers together: DEFERRED, of all rows under way, divided
    by the layers."""
    second_rows: float = 0.0
    """Of `host_rows`, those of the second sub-batch."""
    second_tokens: float = 0.0
    link_tokens: float = 0.0
    """KV tokens over the link that the sweep's rows need: streamed ones, and prompts for the host
    tier."""
    moved_tokens: float = 0.0
    """KV tokens of migrations before the sweep."""
    moves: int = 0
    copied_tokens: float = 0.0
    """KV tokens of migrations beside the sweep, which may outlast it: the next one waits."""
    copies: int = 0
    streamed: bool = False

    @property
    def is_plain(self) -> bool:
        """The device alone."""
        others = self.moves or self.link_tokens or self.copies
        return self.way == GPU_ONLY and not others


def work_of(plan: IterationPlan, under_way: float, cohorts: int) -> SweepWork | None:
    """None without rows. `under_way`: tokens that deferred rows attend to, those that start with
    the plan among them."""
    if not plan.batches and not under_way:
        return None
    first = plan.batches[0] if plan.batches else SubBatch()
    chunks = [chunk for batch in plan.batches for chunk in batch.prefill]
    decode = [row for batch in plan.batches for row in (*batch.gpu_decode, *batch.streamed)]
    host = [row for batch in plan.batches for row in batch.host_decode]
    second = plan.batches[1].host_decode if plan.mode is Mode.ASYMMETRIC else ()
    ends = (c.start + len(c.token_ids) for c in chunks if c.tier is Tier.HOST)
    before = () if plan.copies_beside else plan.migrations
    beside = plan.migrations if plan.copies_beside else ()
    rows: float = len(host)
    tokens: float = sum(row.length for row in host)
    way = INLINE if host else GPU_ONLY
    if plan.mode is Mode.DEFERRED:
        way, tokens = DEFERRED, under_way / cohorts
    elif plan.mode is Mode.ASYMMETRIC:
        way = ASYMMETRIC
    return SweepWork(
        way=way,
        decode=len(decode),
        chunk_rows=sum(len(chunk.token_ids) for chunk in chunks),
        context=sum(row.length for row in decode),
        host_rows=rows,
        host_tokens=tokens,
        second_rows=len(second),
        second_tokens=sum(row.length for row in second),
        link_tokens=sum(row.length for row in first.streamed) + sum(ends),
        moved_tokens=_tokens(before),
        moves=len(before),
        copied_tokens=_tokens(beside),
        copies=len(beside),
        streamed=bool(first.streamed),
    )


def _tokens(migrations: Sequence[Migration]) -> int:
    return sum(migration.tokens for migration in migrations)
