"""The calls that this router has open on one backend, and which of them its newest snapshot knows.

            sent            first message        end
    |--------|===== waiting =====|==== running ====|
                     ^ a snapshot here counts the call among the backend's waiting requests; that it
                       runs since is known only from its first message

A unary call shows no first message before its end: it counts as waiting as long, but never beyond
what the snapshot says is waiting (see router.policies.wait).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SETTLE_SECONDS = 0.05
"""A call may take this long to show up in the backend's snapshots."""


@dataclass(frozen=True)
class OwnCalls:
    """This router's share of a backend's requests, at the moment of choosing. Tokens are those of
    prompts, about."""

    open: int = 0
    unseen: int = 0
    """Sent since the snapshot, and so not counted in it."""
    unseen_waiting_tokens: int = 0
    """Of those of them that have no first message yet."""
    waiting_tokens: int = 0
    """Of those older than the snapshot that have no first message yet."""
    oldest_tokens: int = 0
    """Of the oldest call that waits, seen or not: what the backend computes now, if it is ours."""
    oldest_seconds: float = 0.0
    """For which it has been the oldest."""
    waited_tokens: int = 0
    """The same at the time of the snapshot."""


class OpenCall:
    """One of them. `answered` when its first message comes."""

    __slots__ = ("_calls", "prompt_tokens", "sent_at", "waits")

    def __init__(self, calls: OpenCalls, sent_at: float, prompt_tokens: int) -> None:
        self._calls = calls
        self.sent_at = sent_at
        self.prompt_tokens = prompt_tokens
        self.waits = True

    def answered(self, now: float | None) -> None:
        """The call runs (None: it has ended); said again, this changes nothing."""
        if self.waits:
            self.waits = False
            self._calls.no_longer_waits(self, now)


class OpenCalls:
    """Counts in constant time, but for calls that are younger than the newest snapshot. `now`:
    seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.total = 0
        self._open: dict[int, OpenCall] = {}  # by number, oldest first
        self._waiting: dict[OpenCall, None] = {}  # oldest first
        self._waiting_tokens = 0
        self._oldest_since = 0.0
        self._reported_at = float("-inf")
        self._waited_tokens = 0

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def call(self, now: float, prompt_tokens: int) -> Iterator[OpenCall]:
        number = self.total
        self.total += 1
        call = self._open[number] = OpenCall(self, now, prompt_tokens)
        if not self._waiting:
            self._oldest_since = now
        self._waiting[call] = None
        self._waiting_tokens += prompt_tokens
        try:
            yield call
        finally:
            call.answered(None)
            del self._open[number]

    def no_longer_waits(self, call: OpenCall, now: float | None) -> None:
        del self._waiting[call]
        self._waiting_tokens -= call.prompt_tokens
        if now is not None:
            self._oldest_since = now

    def reported(self, now: float) -> None:
        """A snapshot came."""
        self._reported_at = now
        _, tokens = self._young()
        self._waited_tokens = self._waiting_tokens - tokens

    def view(self, now: float) -> OwnCalls:
        unseen, tokens = self._young()
        oldest = next(iter(self._waiting), None)
        return OwnCalls(
            open=len(self._open),
            unseen=unseen,
            unseen_waiting_tokens=tokens,
            waiting_tokens=self._waiting_tokens - tokens,
            waited_tokens=self._waited_tokens,
            oldest_tokens=oldest.prompt_tokens if oldest else 0,
            oldest_seconds=now - max(oldest.sent_at, self._oldest_since) if oldest else 0.0,
        )

    def _young(self) -> tuple[int, int]:
        """Those that the snapshot cannot know, and the prompts' tokens of those that wait."""
        count = tokens = 0
        for call in reversed(self._open.values()):
            if call.sent_at < self._reported_at - SETTLE_SECONDS:
                break
            count += 1
            tokens += call.prompt_tokens if call.waits else 0
        return count, tokens
