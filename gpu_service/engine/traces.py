"""What became of traced requests within the engine, told to the front end with their usage.

    queue | prefill | prefill | decode gpu ............ | decode host ......... | decode gpu ...
                                 sweep  sweep     sweep         sweep
                                                         ^ move                  ^ move

Costs nothing while no traced request is live. Sweeps are sampled: the first, second, fourth, eighth
... of a choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from gpu_service.engine.counters import direction_of, mode_name
from gpu_service.engine.messages import Mark, RequestUsage
from gpu_service.scheduling.plan import IterationPlan, SweepResult
from gpu_service.scheduling.request import Request

MOST_MARKS = 128
"""Of one request; later ones are left out."""


@dataclass
class _Stretch:
    """Tokens of one choice that the same kind of row brought, one after the other."""

    kind: str
    start: float
    end: float
    tokens: int = 0


@dataclass
class _Trace:
    """One request's marks so far."""

    marks: list[Mark] = field(default_factory=list)
    stretches: dict[int, _Stretch] = field(default_factory=dict)
    sweeps: dict[int, int] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)

    def add(self, name: str, start: float, end: float, **attributes: str | float) -> None:
        if len(self.marks) < MOST_MARKS:
            self.marks.append(Mark(name, start, end, attributes))

    def end_stretch(self, key: int) -> None:
        stretch = self.stretches.pop(key, None)
        if stretch is not None:
            self.add("decode", stretch.start, stretch.end, by=stretch.kind, tokens=stretch.tokens)


class RequestTraces:
    """Used by the engine core's thread."""

    def __init__(self) -> None:
        self._requests: dict[str, _Trace] = {}
        self._choices: dict[int, _Trace] = {}

    def begin(self, request: Request) -> None:
        keys = [choice.key for choice in request.choices]
        trace = self._requests[request.request_id] = _Trace(keys=keys)
        self._choices.update(dict.fromkeys(keys, trace))

    def end(self, request_id: str) -> list[Mark]:
        """What there is to tell of it; [] if it is not traced."""
        trace = self._requests.pop(request_id, None)
        if trace is None:
            return []
        for key in trace.keys:
            trace.end_stretch(key)
            del self._choices[key]
        return trace.marks

    def attach(self, usages: list[RequestUsage]) -> list[RequestUsage]:
        """The usages of requests that have ended, those of traced ones with their marks."""
        if not self._requests:
            return usages
        return [
            msgspec.structs.replace(usage, marks=self.end(usage.request_id)) for usage in usages
        ]

    def count(self, plan: IterationPlan, result: SweepResult, start: float, end: float) -> None:
        """An iteration from `start` to `end`."""
        if not self._choices:
            return
        for migration in plan.migrations:
            if trace := self._choices.get(migration.key):
                trace.end_stretch(migration.key)
                direction = direction_of(migration)
                trace.add("move", start, start, to=direction, tokens=migration.tokens)
        rows = sum(batch.tokens for batch in plan.batches)
        for batch in plan.batches:
            for chunk in batch.prefill:
                if trace := self._choices.get(chunk.key):
                    tokens = len(chunk.token_ids)
                    trace.end_stretch(chunk.key)
                    trace.add("prefill", start, end, tier=chunk.tier.value, tokens=tokens)
            kinds = {"gpu": batch.gpu_decode, "streamed": batch.streamed, "host": batch.host_decode}
            for kind, decode in kinds.items():
                for row in decode:
                    self._row(row.key, kind, plan, result, start, end, rows)
        for flight in result.landed:
            self._row(flight.key, "host", plan, result, start, end, rows)

    def _row(
        self,
        key: int,
        kind: str,
        plan: IterationPlan,
        result: SweepResult,
        start: float,
        end: float,
        rows: int,
    ) -> None:
        trace = self._choices.get(key)
        if trace is None or key not in result.tokens:
            return
        stretch = trace.stretches.get(key)
        if stretch is None or stretch.kind != kind:
            trace.end_stretch(key)
            stretch = trace.stretches[key] = _Stretch(kind, start, end)
        stretch.end = end
        stretch.tokens += 1
        number = trace.sweeps[key] = trace.sweeps.get(key, 0) + 1
        if number & (number - 1) == 0:
            trace.add(
                "sweep", start, end, mode=mode_name(plan), number=plan.number, rows=rows,
                host_wait_seconds=result.host_wait_seconds,
                device_seconds=result.device_seconds,
            )  # fmt: skip
