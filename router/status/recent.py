"""What calls did lately, second by second."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MOST_WAITS = 4096
"""First messages whose waits are kept between two looks; of more, the newest."""


@dataclass(frozen=True)
class Calls:
    """Since the last look."""

    started: int
    failed: int
    messages: int
    p50_seconds: float | None
    """From a call to the first message of its answer; None when none came."""
    p95_seconds: float | None


class RecentCalls:
    """Fed by calls as they go, looked at once a second. Used by one event loop."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=MOST_WAITS)
        self._started = self._failed = self._messages = 0

    def started(self) -> None:
        self._started += 1

    def failed(self) -> None:
        """It ended with an error that is not the client's leaving."""
        self._failed += 1

    def first_message(self, waited_seconds: float) -> None:
        self._waits.append(waited_seconds)

    def message(self) -> None:
        self._messages += 1

    def look(self) -> Calls:
        waits = sorted(self._waits)
        calls = Calls(
            self._started, self._failed, self._messages, _rank(waits, 0.5), _rank(waits, 0.95)
        )
        self._waits.clear()
        self._started = self._failed = self._messages = 0
        return calls


def _rank(ordered: list[float], share: float) -> float | None:
    """The value that `share` of them do not exceed."""
    if not ordered:
        return None
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
