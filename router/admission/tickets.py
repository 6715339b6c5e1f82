"""What admission knows of a request and of a tenant."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from neo_common.errors import Reason
from router.admission.flows import Flow
from router.admission.policy import PriorityClass, TenantLimits
from router.admission.rates import Bucket, Pace

LEARN = 0.1
"""How much the newest request counts in `Tenant.used_part`."""
MIN_USED_PART = 0.01
MAX_USED_PART = 4.0
UNKNOWN_RETRY_SECONDS = 1.0
"""What is said where nothing is known about the wait."""
MIN_RETRY_SECONDS = 0.05
MAX_RETRY_SECONDS = 60.0


class Refusal(Exception):
    """A request is not taken. retry_after: seconds; 0 means that nobody knows."""

    def __init__(self, reason: Reason, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason = reason
        wait = retry_after or UNKNOWN_RETRY_SECONDS
        self.retry_after = min(max(wait, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)


class State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    REFUSED = "refused"
    ENDED = "ended"


@dataclass(eq=False)
class Tenant:
    """What is known of one tenant."""

    name: str
    limits: TenantLimits
    flows: dict[PriorityClass, Flow[Ticket]]
    tokens: Bucket | None = None
    requests: Bucket | None = None
    running: int = 0
    waiting: int = 0
    pace: Pace = field(default_factory=Pace)
    used_part: float = 1.0
    """Of what its requests reserved, what they used, lately; for the order, so that who reserves
    much and uses little does not wait for it."""
    learnt: int = 0
    """From how many requests."""

    def learn(self, used: float, reserved: float) -> None:
        """One of its requests has ended. The first ones count as much as all before them."""
        self.learnt += 1
        part = self.used_part
        part += max(LEARN, 1 / self.learnt) * (used / reserved - part)
        self.used_part = min(max(part, MIN_USED_PART), MAX_USED_PART)

    @property
    def has_room(self) -> bool:
        return not self.limits.max_running or self.running < self.limits.max_running


@dataclass(eq=False)
class Ticket:
    """One request."""

    tenant: Tenant
    rank: PriorityClass
    cost: float
    """Tokens reserved."""
    load: float
    """Tokens that it will probably use, as far as was known when it came; for predictions."""
    arrived: float
    expires: float
    """When it is refused if it still waits."""
    state: State = State.WAITING
    started: float = 0.0
    refusal: Refusal | None = None
    """With state REFUSED."""

    @property
    def flow(self) -> Flow[Ticket]:
        return self.tenant.flows[self.rank]
