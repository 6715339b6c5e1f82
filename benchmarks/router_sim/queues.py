"""How long requests wait behind a router, next to one queue for all engines.

The router's own `Backend` and `Chooser` choose, from snapshots that are up to `interval` seconds
old; the *single queue* holds every request back until some engine can start it, and gives the first
one to the fastest engine that can. It knows everything and decides last; what it does not do is to
wait for a fast engine while a slow one is free, so with unequal engines it can be beaten.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from benchmarks.router_sim.engines import Clock, Job, Machine, SimulatedEngine
from router.backend import Backend
from router.calls import OpenCall
from router.chooser import Chooser
from router.keys import CallKeys
from router.policies import Policy

SMALL = Machine(prefill_tokens_per_second=6_000, token_seconds=0.025, kv_tokens=26_400)
MEDIUM = Machine(prefill_tokens_per_second=14_000, token_seconds=0.014, kv_tokens=60_000)
LARGE = Machine(prefill_tokens_per_second=40_000, token_seconds=0.008, kv_tokens=200_000)
EIGHT = (SMALL,) * 4 + (MEDIUM,) * 2 + (LARGE,) * 2
"""Engines of unequal speed."""
PROMPT_TOKENS, OUTPUT_TOKENS = 1_000.0, 200.0

TOLD_SPREAD = 0.2
"""How far a router is off when it takes a prompt's bytes for its tokens."""


def capacity(machines: Sequence[Machine]) -> float:
    """Requests a second of mean size that they can serve."""
    total = 0.0
    for machine in machines:
        prefill = PROMPT_TOKENS / machine.prefill_tokens_per_second
        resident = prefill + OUTPUT_TOKENS * machine.token_seconds
        slots = machine.kv_tokens / (PROMPT_TOKENS + OUTPUT_TOKENS)
        total += min(1.0 / prefill, slots / resident)
    return total


def workload(count: int, rate: float, seed: int, spread: float = 0.5) -> list[Job]:
    """Poisson arrivals; lengths are lognormal, with these means and `spread`."""
    draw = random.Random(seed)
    now, jobs = 0.0, []

    def length(mean: float) -> int:
        return max(1, round(mean * draw.lognormvariate(-spread * spread / 2, spread)))

    for number in range(count):
        now += draw.expovariate(rate)
        prompt = length(PROMPT_TOKENS)
        told = max(1, round(prompt * draw.lognormvariate(0.0, TOLD_SPREAD)))
        jobs.append(Job(number, now, prompt, length(OUTPUT_TOKENS), told))
    return jobs


def single_queue(machines: Sequence[Machine], jobs: Sequence[Job]) -> None:
    """Serve `jobs` from one queue; their times are filled in."""
    clock, queue, left = Clock(), deque[Job](), len(jobs)

    def done(job: Job) -> None:
        nonlocal left
        left -= 1
        clock.at(clock.now, advance)  # when the engine has taken it off its books

    engines = [SimulatedEngine(str(n), m, clock, done) for n, m in enumerate(machines)]
    engines.sort(key=lambda engine: engine.machine.token_seconds)

    def advance() -> None:
        while queue:
            able = next((engine for engine in engines if engine.can_start(queue[0])), None)
            if able is None:
                return
            able.start(queue.popleft())
            clock.at(able.prefill_free, advance)

    def arrive(job: Job) -> None:
        queue.append(job)
        advance()

    for job in jobs:
        clock.at(job.arrival, lambda job=job: arrive(job))  # type: ignore[misc]
    clock.run(lambda: left == 0)


class SimulatedRouter:
    """One router's knowledge of some engines, and its choices."""

    def __init__(
        self, engines: Sequence[SimulatedEngine], policy: Policy, clock: Clock, seed: int
    ) -> None:
        self.engines = {engine.name: engine for engine in engines}
        self._clock = clock
        self.backends = {
            name: Backend(name, cast(Any, None), stale_seconds=1e9) for name in self.engines
        }
        self._chooser = Chooser(policy, draw=random.Random(seed).random)
        self._open: dict[int, AbstractContextManager[OpenCall]] = {}

    def begin(self, interval: float, going: Callable[[], bool], offset: float = 0.0) -> None:
        """Take snapshots as long as `going`. Those of the engines do not come together."""
        for number, engine in enumerate(self.engines.values()):
            self.backends[engine.name].snapshot(engine.snapshot(), 0.0)
            first = interval * number / len(self.engines) + offset
            self._clock.at(first, lambda engine=engine: self._watch(engine, interval, going))  # type: ignore[misc]

    def _watch(self, engine: SimulatedEngine, interval: float, going: Callable[[], bool]) -> None:
        self.backends[engine.name].snapshot(engine.snapshot(), self._clock.now)
        if going():
            self._clock.at(self._clock.now + interval, lambda: self._watch(engine, interval, going))

    def send(self, job: Job) -> str:
        """Returns the engine's name."""
        served = [((), backend.view(self._clock.now)) for backend in self.backends.values()]
        keys = CallKeys("", job.session, job.prompt, job.told_tokens)
        address = self._chooser.choose(served, keys)
        assert address is not None
        call = self.backends[address].call(self._clock.now, keys.prompt_tokens)
        self._open[job.number] = call
        opened = call.__enter__()
        job.first_message = lambda: opened.answered(self._clock.now)
        self.engines[address].submit(job)
        return address

    def ended(self, job: Job) -> None:
        self._open.pop(job.number).__exit__(None, None, None)


def routed(
    machines: Sequence[Machine],
    jobs: Sequence[Job],
    policy: Policy,
    *,
    routers: int = 1,
    interval: float = 0.2,
    seed: int = 0,
) -> list[SimulatedEngine]:
    """Serve `jobs` through routers that take turns; the jobs' times are filled in."""
    clock, left = Clock(), len(jobs)
    sides: list[SimulatedRouter] = []

    def done(job: Job) -> None:
        nonlocal left
        left -= 1
        sides[job.number % routers].ended(job)

    engines = [SimulatedEngine(f"e{n}", m, clock, done) for n, m in enumerate(machines)]
    sides += [SimulatedRouter(engines, policy, clock, seed + n) for n in range(routers)]
    for side, router in enumerate(sides):
        router.begin(interval, lambda: left > 0, interval * side / routers / len(engines))
    for job in jobs:
        clock.at(job.arrival, lambda job=job: sides[job.number % routers].send(job))  # type: ignore[misc]
    clock.run(lambda: left == 0)
    return engines


def percentile(jobs: Sequence[Job], part: float) -> float:
    """Of their waits in seconds, the first tenth of the jobs left out: queues fill up there."""
    waits = sorted(job.wait for job in jobs[len(jobs) // 10 :])
    return waits[min(len(waits) - 1, int(part * len(waits)))]
