"""What a policy sees: frozen snapshots of each backend, and what is known of the call."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class BackendState(enum.Enum):
    """See neo.v1.BackendState."""

    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"
    DRAINING = "draining"


@dataclass(frozen=True)
class LoadView:
    """The part of a neo.v1.LoadSnapshot that the choice needs."""

    total_tokens: int
    """KV room of both tiers."""
    used_tokens: int
    running_requests: int
    waiting_requests: int
    waiting_prompt_tokens: int
    max_waiting_requests: int
    """0 means no bound."""


@dataclass(frozen=True)
class BackendView:
    """One backend at the moment of choosing."""

    address: str
    state: BackendState
    load: LoadView | None
    """None before the first snapshot."""
    in_flight: int
    """Calls that this router has open on it."""
    unseen: int
    """Those of them that are younger than the snapshot, and so not counted in it."""
    age_seconds: float = 0.0
    """Of the snapshot."""

    @property
    def requests(self) -> int:
        """On it now, as far as can be known: this router's and others'."""
        if self.load is None:
            return self.in_flight
        known = self.load.running_requests + self.load.waiting_requests
        return max(known + self.unseen, self.in_flight)


@dataclass(frozen=True)
class CallView:
    """One call at the moment of choosing."""

    session: bytes = b""
    """Calls with the same one belong together; empty when its client did not say."""
    prefix: tuple[bytes, ...] = ()
    """A name for each beginning of the prompt, shortest first; see router.prefixes."""
    known: tuple[str, ...] = ()
    """For each of `prefix` the address that had a prompt with this beginning last, or ""."""
    turn: int = field(default=0, compare=False)
    """Counts the router's choices."""
    chance: float = field(default=0.0, compare=False)
    """A draw from [0, 1)."""
