"""What was decided about modes, for all the other decisions of an iteration."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_service.scheduling.work import GPU_ONLY


@dataclass(frozen=True)
class Decision:
    """What holds until the next one."""

    way: str = GPU_ONLY
    """One of `work.WAYS`."""
    host_rows: float = 0.0
    """Host rows a sweep that the host keeps up with; DEFERRED: that start in it."""
    streamed_rows: float = 0.0
    host_tokens: float = 0.0
    """KV tokens of the host rows."""
    streamed_tokens: float = 0.0
    resident_tokens: float = 0.0
    """KV that the host tier should hold for that; no more is sent there."""
    rate: float = 0.0
    """Tokens a millisecond that this promises."""
    gpu_only_rate: float = 0.0
    """The device alone."""
    sweep_ms: float = 0.0
    why: str = "nothing to do"

    @property
    def offloads(self) -> bool:
        return self.way != GPU_ONLY or self.streamed_rows > 0
