"""How many calls the router holds at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from neo_common.errors import Reason, ServiceError


class Gate:
    """Counts open calls and refuses those above a bound. Used by one event loop."""

    def __init__(self, max_calls: int, retry_after_seconds: float) -> None:
        self._max_calls = max_calls
        self._retry_after_seconds = retry_after_seconds
        self.open = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Raises ServiceError (RESOURCE_EXHAUSTED) when the bound is reached."""
        if self.open >= self._max_calls:
            raise ServiceError(
                Reason.OVERLOADED,
                f"the router already holds its {self._max_calls} calls",
                retry_after=self._retry_after_seconds,
            )
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1
