"""What a fleet is asked for, and the part of it that one of N replicas gets.

The router sends a request to the replica with the most room, so that N replicas share arrivals more
evenly than dice would. Every N-th request is what one of them gets here, and a Poisson process of
an N-th of the rate where there is no trace: dice, which is the worse case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neo_client.workloads import Lengths, read_workload
from neo_client.workloads.arrivals import poisson
from neo_client.workloads.traces import Traced, read_trace


@dataclass(frozen=True)
class Part:
    """Requests of one replica."""

    arrivals: list[float]
    """Seconds since the first of them, ascending."""
    lengths: list[Lengths]

    @property
    def rate(self) -> float:
        """Requests a second."""
        seconds = self.arrivals[-1] - self.arrivals[0] if self.arrivals else 0.0
        return (len(self.arrivals) - 1) / seconds if seconds else 0.0


@dataclass(frozen=True)
class Demand:
    """Requests of all users together."""

    rate: float
    """A second; of a trace its mean."""
    workload: str
    """`INxOUT` or a file of lengths; of a trace its name."""
    trace: tuple[Traced, ...] = ()
    seed: int = 0
    scale: float = 1.0
    """Multiplies the arrivals: a trace comes that many times as fast."""

    def part(self, replicas: float, requests: int) -> Part:
        """At most `requests` of one of `replicas`: of a trace where most come."""
        if not self.trace:
            times = poisson(requests, self.rate * self.scale / replicas, self.seed)
            return Part(times, read_workload(self.workload, requests, self.seed))
        mine = thinned(self.trace, replicas)
        rows = busiest(mine, requests)
        begin = rows[0].at
        times = [(row.at - begin) / self.scale for row in rows]
        return Part(times, [row.lengths for row in rows])

    def sample(self, requests: int) -> list[Lengths]:
        """Lengths without times."""
        if self.trace:
            step = max(len(self.trace) // requests, 1)
            return [row.lengths for row in self.trace[::step][:requests]]
        return read_workload(self.workload, requests, self.seed)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        rows = [r.lengths for r in self.trace] or read_workload(self.workload, 1000, self.seed)
        return max(each.prompt + each.output for each in rows)


def demand_of(
    rate: float | None, workload: str, trace: str | None, seed: int, longest: int
) -> tuple[Demand, int]:
    """A demand, and how many requests of its trace were left out since they are longer than the
    model's `longest`. ValueError where it is neither a rate nor a trace, or both."""
    if trace is None:
        if rate is None or rate <= 0:
            raise ValueError("rate must be given, and be positive, where there is no trace")
        demand = Demand(rate, workload, seed=seed)
        if demand.longest > longest:
            raise ValueError(
                f"workload {workload} has requests of {demand.longest} tokens; the model's context "
                f"is {longest}"
            )
        return demand, 0
    rows = read_trace(trace)
    fit = tuple(r for r in rows if r.lengths.prompt + r.lengths.output <= longest)
    if len(fit) < 2:
        raise ValueError(f"trace {trace} has no two requests within the model's context")
    seconds = fit[-1].at - fit[0].at
    if not seconds:
        raise ValueError(f"trace {trace} has all its requests at the same time")
    own = (len(fit) - 1) / seconds
    scale = 1.0 if rate is None else rate / own
    return Demand(own, trace, fit, seed, scale), len(rows) - len(fit)


def thinned(rows: Sequence[Traced], replicas: float) -> list[Traced]:
    """Every so many-th."""
    count = max(int(len(rows) / replicas), 1)
    return [rows[int(place * replicas)] for place in range(count)]


def busiest(rows: Sequence[Traced], requests: int) -> Sequence[Traced]:
    """The shortest stretch of so many requests."""
    if len(rows) <= requests:
        return rows
    spans = [
        (rows[first + requests - 1].at - rows[first].at, first)
        for first in range(len(rows) - requests + 1)
    ]
    _, first = min(spans)
    return rows[first : first + requests]
