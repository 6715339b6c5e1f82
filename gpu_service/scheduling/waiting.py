"""The queue of choices that hold no blocks."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from gpu_service.scheduling.request import Choice


class WaitingQueue:
    """Sorted by `Choice.order`: a choice that was preempted goes back to the place that its arrival
    gives it."""

    def __init__(self) -> None:
        self._choices: list[Choice] = []

    def __len__(self) -> int:
        return len(self._choices)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self._choices)

    def push(self, choice: Choice) -> None:
        bisect.insort(self._choices, choice, key=_order)

    def remove(self, choice: Choice) -> None:
        place = bisect.bisect_left(self._choices, choice.order, key=_order)
        assert self._choices[place] is choice
        del self._choices[place]


def _order(choice: Choice) -> tuple[int, float, int]:
    return choice.order
