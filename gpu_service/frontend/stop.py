"""Finding stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Text goes in piece by piece; what comes out can no longer become part of a stop string.

    The earliest match wins; of those that begin at the same place, the one that was asked for
    first. Held back is at most the longest stop string less one character.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """The text that is now certain. After a match (`found`), only what stood before it."""
        assert self.found is None, "nothing follows a match"
        if not self._stop:
            return piece
        text = self._held + piece
        matches = [(text.find(stop), order) for order, stop in enumerate(self._stop)]
        at, order = min((match for match in matches if match[0] >= 0), default=(-1, -1))
        if at >= 0:
            self.found = self._stop[order]
            self._held = ""
            return text[:at]
        keep = self._possible(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
