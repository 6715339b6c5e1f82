"""Many nodes behind several routers: what reports cost, how evenly requests spread, and what is
left when a zone goes.

Nodes are coarse here: so many requests at once, the others wait in order. Routers are the policy
"least pressure" (`router/policies/pressure.py`): what a node's last report said it had, and one
more for each request that this router has sent there since.

    router 1   report of node 1 |----- sends -----| report |---
    router 2         |----- sends -----| report |---            each (router, node) at its own time
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

REPORT_BYTES = 118 + 14 + 66
"""A snapshot, gRPC's and HTTP/2's frames around it, TCP's and IP's headers."""
SLICES = 20
"""Of a report's interval, in which reports arrive together."""
MEASURED_SPANS = 2.0
"""Times a request's duration that is watched, before the loss of a zone and after it."""
SHAPE = 4.0
"""Of durations: gamma distributed, half as wide as they are long."""


@dataclass(frozen=True)
class FleetWishes:
    """What each node gets and can do."""

    node_rate: float
    """Requests a second of each node."""
    seconds: float
    """That a request takes once it has a slot."""
    slots: int
    """Requests at once."""
    output_tokens: int
    router_messages: float
    """A second, that a router relays."""
    interval_ms: int
    zones: int
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError naming the field."""
        for name in ("node_rate", "seconds", "slots", "output_tokens", "router_messages"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name.replace('_', '-')} must be positive")
        if self.interval_ms < 10:
            raise ValueError("interval-ms must be at least 10")
        if self.zones < 2:
            raise ValueError("lost-zones must be at least 2")
        if self.load >= 1:
            raise ValueError(
                f"{self.node_rate:g} requests/s of {self.seconds:g} s are {self.load:.0%} of "
                f"{self.slots} slots: queues would grow for ever"
            )

    @property
    def load(self) -> float:
        """Part of the slots that is in use, on average."""
        return self.node_rate * self.seconds / self.slots


@dataclass(frozen=True)
class FleetRow:
    """A line of the table."""

    nodes: int
    routers: int
    reports_per_second: float
    """That each router takes in."""
    report_mbit: float
    """Of all routers together."""
    spread: float
    """The most loaded node over the mean, 99th percentile over time."""
    waited: float
    """Requests that waited for a slot, as a share; nodes had free ones, if routers had known."""
    lost: int
    """Requests that a zone's loss ends, and that are sent again; 0: there are no zones."""
    load_after: float
    """Part of the remaining slots that is then in use."""
    waited_after: float
    wait_p99_seconds: float
    """After the loss."""


def routers_for(wishes: FleetWishes, nodes: int) -> int:
    """Enough for the messages with one of them lost, and one in each zone of several nodes."""
    if nodes == 1:
        return 1
    messages = nodes * wishes.node_rate * wishes.output_tokens
    return max(math.ceil(messages / wishes.router_messages) + 1, min(wishes.zones, nodes))


def fleet_row(wishes: FleetWishes, nodes: int) -> FleetRow:
    routers = routers_for(wishes, nodes)
    per_second = 1000 / wishes.interval_ms
    fleet = Fleet(wishes, nodes, routers)
    span = MEASURED_SPANS * wishes.seconds
    fleet.run(span)
    before = fleet.take()
    lost = 0
    after = Watched([0.0], 0, 1.0)
    left = nodes
    if nodes >= wishes.zones:
        gone = nodes // wishes.zones
        lost, left = fleet.lose(gone), nodes - gone
        fleet.run(span)
        after = fleet.take()
    return FleetRow(
        nodes=nodes,
        routers=routers,
        reports_per_second=nodes * per_second,
        report_mbit=routers * nodes * per_second * REPORT_BYTES * 8 / 1e6,
        spread=before.spread,
        waited=before.waited / len(before.waits),
        lost=lost,
        load_after=wishes.load * nodes / left,
        waited_after=after.waited / len(after.waits),
        wait_p99_seconds=float(np.percentile(after.waits, 99)),
    )


@dataclass
class Watched:
    """What was seen since the last look."""

    waits: list[float]
    waited: int
    spread: float


class Fleet:
    """Nodes and routers in time."""

    def __init__(self, wishes: FleetWishes, nodes: int, routers: int) -> None:
        self._wishes = wishes
        self._draw = np.random.default_rng([wishes.seed, nodes])
        self._nodes, self._routers = nodes, routers
        self._alive = np.ones(nodes, dtype=bool)
        self._present: Ints = np.zeros(nodes, dtype=np.int64)
        """Requests on each node, waiting ones included."""
        self._ends: list[list[float]] = [[] for _ in range(nodes)]
        """A heap for each node: when its slots become free."""
        self._leaving: list[tuple[float, int]] = []
        """A heap of (end, node)."""
        self._reported: Ints = np.zeros((routers, nodes), dtype=np.int64)
        self._unseen: Ints = np.zeros((routers, nodes), dtype=np.int64)
        phases = self._draw.integers(SLICES, size=(routers, nodes))
        self._due = [np.nonzero(phases == number) for number in range(SLICES)]
        self._now, self._slice = 0.0, 0
        self._resend = 0
        self._watched = Watched([], 0, 1.0)
        self._spreads: list[float] = []
        self._fill()

    def _fill(self) -> None:
        """As it is once it has run for long: the mean number on each node, part of the way."""
        wishes = self._wishes
        for node in range(self._nodes):
            for _ in range(round(wishes.load * wishes.slots)):
                left = self._draw.random() * self._duration()
                self._start(node, self._now + left)
        self._reported[:] = self._present

    def _duration(self) -> float:
        return float(self._draw.gamma(SHAPE, self._wishes.seconds / SHAPE))

    def _start(self, node: int, end: float) -> None:
        heapq.heappush(self._ends[node], end)
        heapq.heappush(self._leaving, (end, node))
        self._present[node] += 1

    def run(self, seconds: float) -> None:
        step = self._wishes.interval_ms / 1000 / SLICES
        for _ in range(math.ceil(seconds / step)):
            self._leave()
            rows, columns = self._due[self._slice]
            self._reported[rows, columns] = self._present[columns]
            self._unseen[rows, columns] = 0
            self._slice = (self._slice + 1) % SLICES
            # Of all nodes' users, also those whose node is gone.
            count = int(self._draw.poisson(self._nodes * self._wishes.node_rate * step))
            self._arrive(count + self._resend)
            self._resend = 0
            present = self._present[self._alive]
            self._spreads.append(float(present.max() / max(present.mean(), 1e-9)))
            self._now += step

    def _leave(self) -> None:
        while self._leaving and self._leaving[0][0] <= self._now:
            _, node = heapq.heappop(self._leaving)
            if self._alive[node]:
                self._present[node] -= 1

    def _arrive(self, count: int) -> None:
        routers = self._draw.integers(self._routers, size=count)
        for router in routers:
            seen = self._reported[router] + self._unseen[router]
            least = seen.min()
            ties = np.nonzero(seen == least)[0]
            node = int(ties[self._draw.integers(len(ties))])
            self._unseen[router, node] += 1
            self._serve(node)

    def _serve(self, node: int) -> None:
        """It takes the slot that is free first."""
        ends = self._ends[node]
        wait = 0.0
        if len(ends) >= self._wishes.slots:
            wait = max(heapq.heappop(ends) - self._now, 0.0)
        self._watched.waits.append(wait)
        self._watched.waited += wait > 0
        self._start(node, self._now + wait + self._duration())

    def lose(self, nodes: int) -> int:
        """The first `nodes` are gone: connections break, so routers know at once, and what was
        there is sent again. Returns how many those were."""
        lost = int(self._present[:nodes].sum())
        self._alive[:nodes] = False
        self._present[:nodes] = 0
        for node in range(nodes):
            self._ends[node].clear()
        # Never the least again, by any report.
        far = np.iinfo(np.int64).max // 4
        self._reported[:, :nodes] = far
        for number, (rows, columns) in enumerate(self._due):
            keep = columns >= nodes
            self._due[number] = (rows[keep], columns[keep])
        self._resend = lost
        return lost

    def take(self) -> Watched:
        """What was seen, and a fresh look."""
        seen = self._watched
        seen.spread = float(np.percentile(self._spreads, 99)) if self._spreads else 1.0
        self._watched, self._spreads = Watched([], 0, 1.0), []
        return seen


def as_rows(rows: Sequence[FleetRow]) -> list[tuple[str, ...]]:
    """Cells for people."""
    return [
        (
            f"{row.nodes:,}",
            f"{row.routers:,}",
            f"{row.reports_per_second:,.0f}",
            f"{row.report_mbit:,.2f}",
            f"{row.spread:.2f}",
            f"{row.waited:.1%}",
            f"{row.lost:,}" if row.lost else "-",
            f"{row.load_after:.0%}" if row.lost else "-",
            f"{row.waited_after:.0%}" if row.lost else "-",
            f"{row.wait_p99_seconds:.1f}" if row.lost else "-",
        )
        for row in rows
    ]
