"""What a policy sees: frozen snapshots of each backend, and what is known of the call."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from router.calls import OwnCalls


class BackendState(enum.Enum):
    """See neo.v1.BackendState."""

    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"
    DRAINING = "draining"


@dataclass(frozen=True)
class TierView:
    """One tier's KV."""

    total_tokens: int = 0
    """Room; 0 means that there is no such tier."""
    used_tokens: int = 0
    running_requests: int = 0
    freed_tokens_per_second: float = 0.0
    """Given back by requests that end or leave; 0 means unknown, as below."""
    token_seconds: float = 0.0
    """Between two tokens of a request here."""

    @property
    def free_tokens(self) -> int:
        return self.total_tokens - self.used_tokens


@dataclass(frozen=True)
class LoadView:
    """The part of a neo.v1.LoadSnapshot that the choice needs."""

    gpu: TierView
    host: TierView
    waiting_requests: int = 0
    waiting_prompt_tokens: int = 0
    max_waiting_requests: int = 0
    """0 means no bound."""
    prompt_tokens_per_second: float = 0.0
    """While prompts are computed; 0 means unknown."""

    @property
    def total_tokens(self) -> int:
        """KV room of both tiers, and below what is used of it, and by how many."""
        return self.gpu.total_tokens + self.host.total_tokens

    @property
    def used_tokens(self) -> int:
        return self.gpu.used_tokens + self.host.used_tokens

    @property
    def running_requests(self) -> int:
        return self.gpu.running_requests + self.host.running_requests


@dataclass(frozen=True)
class BackendView:
    """One backend at the moment of choosing."""

    address: str
    state: BackendState
    load: LoadView | None
    """None before the first snapshot."""
    own: OwnCalls = OwnCalls()  # noqa: RUF009 -- frozen
    """This router's calls on it."""
    age_seconds: float = 0.0
    """Of the snapshot."""

    @property
    def requests(self) -> int:
        """On it now, as far as can be known: this router's and others'."""
        if self.load is None:
            return self.own.open
        known = self.load.running_requests + self.load.waiting_requests
        return max(known + self.own.unseen, self.own.open)


@dataclass(frozen=True)
class CallView:
    """One call at the moment of choosing."""

    prompt_tokens: int = 0
    """Of its prompt, about; 0 when nothing is known."""
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
