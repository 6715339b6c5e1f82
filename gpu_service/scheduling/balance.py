"""Which host decode rows go into which of two sub-batches (mode ASYMMETRIC).

The device and the host work on different sub-batches at any time. With `linear` for a layer's dense
part and `attn` for its attention, a layer of both takes

    max( linear(0) + attn_gpu(0), attn_cpu(1) )  +  max( linear(1), attn_cpu(0) )

so that the host's rows of sub-batch 1 hide behind sub-batch 0, which has all of the device's rows,
and those of sub-batch 0 behind the dense layers of sub-batch 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gpu_service.scheduling.plan import DecodeRow, SubBatch


class LayerCosts(Protocol):
    """Milliseconds of one layer."""

    def linear_ms(self, rows: int) -> float:
        """Dense layers of one sub-batch, one row at least."""
        ...

    def gpu_attention_ms(self, batch: SubBatch) -> float:
        """Attention of prompt chunks and of the GPU tier's decode rows."""
        ...

    def host_attention_ms(self, tokens: int) -> float:
        """The host's attention of decode rows that attend to so many tokens together."""
        ...


@dataclass
class _Share:
    """The host rows of one sub-batch."""

    rows: int = 0
    tokens: int = 0


def split(batch: SubBatch, costs: LayerCosts | None = None) -> tuple[SubBatch, ...]:
    """`batch` as one or two sub-batches: the second of host rows alone, the first with all others.

    Without costs, the host has as many tokens to read for the one as for the other; with them, what
    takes least, which may be `batch` as it is. There must be something for the host to hide behind:
    a single row stays one sub-batch.
    """
    rows = batch.host_decode
    others = batch.tokens - len(rows)
    if not rows or (len(rows) == 1 and not others):
        return (batch,)
    shares = _Share(), _Share()
    time = _time_of(batch, shares, costs)
    second: set[int] = set()
    # The longest first, each to where it costs least; as they come among equal ones.
    for row in sorted(rows, key=lambda row: -row.length):
        times = [_with(share, row, time) for share in shares]
        lane = 0 if times[0] < times[1] else 1
        shares[lane].rows += 1
        shares[lane].tokens += row.length
        if lane:
            second.add(row.key)
    if not second or (len(second) == len(rows) and not others):
        return (batch,)
    if costs is not None and _inline_ms(batch, costs) <= time():
        return (batch,)
    return (
        SubBatch(
            prefill=batch.prefill,
            gpu_decode=batch.gpu_decode,
            streamed=batch.streamed,
            host_decode=tuple(row for row in rows if row.key not in second),
        ),
        SubBatch(host_decode=tuple(row for row in rows if row.key in second)),
    )


def _time_of(
    batch: SubBatch, shares: tuple[_Share, _Share], costs: LayerCosts | None
) -> Callable[[], float]:
    """Of one layer with the shares as they are; without costs, what the larger one reads."""
    first, second = shares
    if costs is None:
        return lambda: float(max(first.tokens, second.tokens))
    others = batch.tokens - len(batch.host_decode)
    attention = costs.gpu_attention_ms(batch)

    def time() -> float:
        device = costs.linear_ms(max(1, others + first.rows)) + attention
        host = costs.host_attention_ms(second.tokens)
        # The second pass over the weights costs the same for the first row as for none.
        behind = max(costs.linear_ms(max(1, second.rows)), costs.host_attention_ms(first.tokens))
        return max(device, host) + behind

    return time


def _with(share: _Share, row: DecodeRow, time: Callable[[], float]) -> float:
    """The time if `row` joined the share."""
    share.rows += 1
    share.tokens += row.length
    found = time()
    share.rows -= 1
    share.tokens -= row.length
    return found


def _inline_ms(batch: SubBatch, costs: LayerCosts) -> float:
    tokens = sum(row.length for row in batch.host_decode)
    attention = max(costs.gpu_attention_ms(batch), costs.host_attention_ms(tokens))
    return costs.linear_ms(batch.tokens) + attention
