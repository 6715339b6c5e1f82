"""What the host tier costs on one machine with one model: where predictions start from."""

from __future__ import annotations

import msgspec


class HostRates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Milliseconds, all layers together. A KV token is one token's K and V in every layer."""

    cpu_token_ms: float
    """The host's attention, for each KV token that it reads."""
    cpu_sweep_ms: float = 0.0
    """The host's attention beside that, for each sweep."""
    link_token_ms: float = 0.0
    """A KV token over the link, either way, that a migration copies."""
    streamed_token_ms: float = 0.0
    """A KV token over the link that a sweep's rows read or write there."""
    move_ms: float = 0.0
    """A migration beside its tokens."""
    deferred_ms: float = 0.0
    """What the exchange with the host adds to a deferred sweep."""
    streamed_ms: float = 0.0
    """What reading over the link adds to a sweep with streamed rows, while it hides."""
    inline_ms: float = 0.0
    """What a sweep takes longer that waits for its host rows in every layer, beside their
    attention: submits, waits, and launches that no graph holds."""

    def validate(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not (0 <= value < float("inf")) and name != "cpu_token_ms":
                raise ValueError(f"{name} must be a number of milliseconds, not {value}")
        if not self.cpu_token_ms > 0:
            raise ValueError(f"cpu_token_ms must be more than 0, not {self.cpu_token_ms}")


NO_HOST = HostRates(cpu_token_ms=float("inf"))
"""Of a machine that nobody has measured, or without a host tier: nothing is sent there."""
