"""Weighted fair order of what waits: start-time fair queueing (Goyal et al., 1996), twice.

Classes share by their weights; in a class, tenants by theirs. A flow's head gets a start tag when
the flow becomes ready; the smallest tag goes first, and the flow's next tag is `cost / weight`
later:

    acme (4)   0 · · · 1 · · · 2 · · ·        tags in virtual time, requests of cost 4:
    beta (1)   0 · · · · · · · · · · · · · · · 4        acme goes four times as often

Nobody starves: each start moves its flow's tag on, so another's becomes the smallest. Who was away
has saved up nothing: a new tag is never before the tag last served. Order within a flow is first
come, first served.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Flow(Generic[T]):
    """What one tenant has waiting in one class. The order's own fields; others read them."""

    weight: float
    waiting: OrderedDict[T, float] = field(default_factory=OrderedDict)
    """Item -> cost, oldest first."""
    cost: float = 0.0
    """Of all of `waiting`."""
    tag: float = 0.0
    """Start tag of the head while `ready`."""
    finish: float = 0.0
    """No start tag of this flow will be before."""
    ready: bool = False
    """Is in the heap."""

    def push(self, item: T, cost: float) -> None:
        self.waiting[item] = cost
        self.cost += cost

    def remove(self, item: T) -> None:
        self.cost -= self.waiting.pop(item)
        if not self.waiting:
            self.cost = 0.0

    def head(self) -> T:
        return next(iter(self.waiting))

    def newest(self) -> T:
        return next(reversed(self.waiting))


class FairOrder(Generic[T]):
    """The flows of one class. Knows nothing of limits: a flow that may not go is not `ready`."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, float, int, Flow[T]]] = []
        self._numbers = itertools.count()
        self._now = 0.0

    def offer(self, flow: Flow[T]) -> None:
        """Its head may go. Idempotent."""
        if not flow.ready and flow.waiting:
            flow.ready = True
            flow.tag = max(self._now, flow.finish)
            # Of equal tags the heavier flow goes first.
            entry = (flow.tag, -flow.weight, next(self._numbers), flow)
            heapq.heappush(self._heap, entry)

    def first(self) -> Flow[T] | None:
        """Whose head goes next; None when nothing is ready."""
        while self._heap:
            flow = self._heap[0][3]
            if flow.waiting:
                return flow
            self.withdraw()
        return None

    def withdraw(self) -> None:
        """`first` may not go after all; it can be offered again."""
        heapq.heappop(self._heap)[3].ready = False

    def charge(self, flow: Flow[T], cost: float) -> None:
        """One of `flow` goes, be it from the queue or past it."""
        tag = flow.tag if flow.ready else max(self._now, flow.finish)
        self._now = max(self._now, tag)
        flow.finish = tag + cost / flow.weight
