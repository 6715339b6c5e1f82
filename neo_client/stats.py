"""What one stream took, as its client saw it."""

from __future__ import annotations

from dataclasses import dataclass

from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types


@dataclass
class StreamStats:
    """Times are seconds of the caller's clock."""

    started: float
    first_at: float | None = None
    last_at: float | None = None
    tokens: int = 0
    usage: types.Usage | None = None

    def take(self, message: inference.GenerateStreamResponse, now: float) -> None:
        """Count a message that came at `now`."""
        new = sum(len(delta.token_ids) for delta in message.deltas)
        if new:
            self.first_at = now if self.first_at is None else self.first_at
            self.last_at = now
            self.tokens += new
        if message.HasField("usage"):
            self.usage = message.usage

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token."""
        return None if self.first_at is None else 1000 * (self.first_at - self.started)

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first."""
        if self.first_at is None or self.last_at is None or self.tokens < 2:
            return None
        return 1000 * (self.last_at - self.first_at) / (self.tokens - 1)

    def line(self) -> str:
        """TTFT, TPOT, and on which tier the tokens were decoded."""
        parts = [
            f"TTFT {number(self.ttft_ms)} ms",
            f"TPOT {number(self.tpot_ms)} ms",
            f"{self.tokens} tokens",
        ]
        if self.usage is not None:
            usage = self.usage
            cached = f" ({usage.prefix_hit_tokens} cached)" if usage.prefix_hit_tokens else ""
            parts += [
                f"decoded on GPU tier {usage.gpu_tokens} / host tier {usage.host_tokens}",
                f"prompt {usage.prompt_tokens}{cached}",
            ]
            moves = usage.demotions + usage.promotions
            parts += [f"{moves} migrations"] if moves else []
        return " | ".join(parts)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
