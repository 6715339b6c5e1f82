"""What was seen of one request.

    intended        sent          first token      last token   end
       | delay ...... |                |               |          |
       |------------- ttft ----------->|---- tpot ---->|          |
       |----------------------------- e2e ----------------------->|
                      |-- sent_ttft -->|

A generator that is late with a request, or holds it back, must not hide what the server's users
would have waited: latencies count from the intended time. Those from sending are there as well.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from protos.neo.v1 import types_pb2 as types

OK = "OK"


@dataclass
class Sample:
    """One request. Times in seconds since the run's start."""

    session: int
    turn: int
    due: float
    """The intended time; in a closed loop when the worker was free."""
    sent: float
    prompt_tokens: int
    """Asked for; 0 where the server tokenizes, until it has said how many."""
    wanted_tokens: int
    warmup: bool = False
    """Left out of all figures."""
    first: float | None = None
    last: float | None = None
    end: float = 0.0
    tokens: int = 0
    messages: int = 0
    """Those with tokens."""
    gaps: array[float] = field(default_factory=lambda: array("d"))
    """Seconds between messages with tokens."""
    code: str = OK
    reason: str = ""
    usage: types.Usage | None = None

    def take(self, tokens: int, now: float) -> None:
        """`tokens` came in a message."""
        if self.last is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.tokens += tokens
        self.messages += 1

    @property
    def ok(self) -> bool:
        return self.code == OK

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.due

    @property
    def sent_ttft(self) -> float | None:
        return None if self.first is None else self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean time per token after the first."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    @property
    def e2e(self) -> float:
        return self.end - self.due

    @property
    def sent_e2e(self) -> float:
        return self.end - self.sent

    @property
    def delay(self) -> float:
        return self.sent - self.due
