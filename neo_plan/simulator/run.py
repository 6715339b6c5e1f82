"""Drives the engine's own loop by a fake clock.

    engine's thread   | decide n+1 |wait        | account n | decide n+2 | ...
    device            |=== sweep n ============|=== sweep n+1 ===========|

`EngineCore` and all that it calls are the real ones; its runner and its clock are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Output, SamplingSpec, Submit
from gpu_service.model.sampling import SamplingRow
from gpu_service.offload.host_tier import HostTierState, HostWork
from gpu_service.offload.null_tier import NullHostTier
from gpu_service.pipeline.launch import LaunchedSweep
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.limits import SchedulerLimits
from gpu_service.scheduling.plan import Flight, IterationPlan, Mode, SampledToken, SweepResult
from gpu_service.scheduling.rates import HostRates
from gpu_service.scheduling.scheduler import Scheduler
from neo_client.workloads import Lengths
from neo_plan.simulator.machine import SweepTime

_TOKEN = SampledToken(0)


class MachineModel(Protocol):
    """All that a simulation asks of a machine; see `machine.Machine`."""

    def sweep(self, plan: IterationPlan, under_way: Sequence[int]) -> SweepTime:
        """How long the device takes for a plan that is not empty, while host rows that attend to so
        many tokens each are under way in deferred mode."""
        ...

    def host_ms(self, plan: IterationPlan) -> float:
        """What the engine's thread computes for that iteration."""
        ...

    def start_costs(self) -> SweepCosts | None:
        """What the engine would know of sweeps when it starts."""
        ...

    def start_rates(self) -> HostRates | None:
        """What it would know of the host tier then."""
        ...


@dataclass(frozen=True)
class Sweep:
    """One iteration. Times in seconds since the start."""

    begin: float
    end: float
    time: SweepTime
    rows: int
    decode_rows: int


@dataclass
class Life:
    """When things happened to one request; seconds since the start."""

    arrival: float
    tokens: list[float] = field(default_factory=list)
    """When each token came."""


@dataclass(frozen=True)
class Trace:
    """All that a run has shown."""

    sweeps: list[Sweep]
    lives: list[Life]
    seconds: float
    host_tokens: int
    recomputations: int
    migrations: int


def simulate(
    machine: MachineModel,
    limits: SchedulerLimits,
    lengths: Sequence[Lengths],
    arrivals: Sequence[float],
    see: Callable[[EngineCore], None] | None = None,
    placements: Sequence[str] = (),
) -> Trace:
    """Serve requests of these lengths, which come at `arrivals` (seconds, ascending). `see`: is
    shown the engine before it starts. `placements`: of each of them; empty: "auto".

    ValueError if one of them can never be served."""
    host = HealthyHostTier(limits.host_blocks)
    runner = SimulatedRunner(machine, limits.cohorts, host)
    scheduler = Scheduler(limits, machine.start_costs(), machine.start_rates())
    core = EngineCore(scheduler, runner, host, vocab_size=1, clock=runner.clock)
    lives = [Life(arrival) for arrival in arrivals]
    if see is not None:
        see(core)
    submitted = host_tokens = 0
    while submitted < len(lives) or scheduler.live_requests:
        if not scheduler.live_requests:
            runner.now = max(runner.now, arrivals[submitted])
        while submitted < len(lives) and arrivals[submitted] <= runner.now:
            placement = placements[submitted] if placements else "auto"
            core.handle(_submit(submitted, lengths[submitted], arrivals[submitted], placement))
            submitted += 1
        output = core.step()
        assert core.made_progress or not scheduler.live_requests, "nothing can run"
        if output is not None:
            host_tokens += _hear(output, lives, runner.now)
    return Trace(
        sweeps=runner.sweeps,
        lives=lives,
        seconds=runner.now,
        host_tokens=host_tokens,
        recomputations=scheduler.state.recomputations,
        migrations=sum(scheduler.state.migrations.values()),
    )


def _submit(number: int, lengths: Lengths, arrival: float, placement: str) -> Submit:
    return Submit(
        request_id=str(number),
        prompt_token_ids=[0] * lengths.prompt,
        sampling=SamplingSpec(temperature=0, max_tokens=lengths.output, ignore_eos=True),
        arrival=arrival,
        placement=placement,
    )


def _hear(output: Output, lives: list[Life], now: float) -> int:
    """Returns the tokens that ended requests had from the host tier."""
    if output.refusals:
        raise ValueError(output.refusals[0].message)
    for delta in output.deltas:
        lives[int(delta.request_id)].tokens.append(now)
    return sum(usage.host_tokens for usage in output.usages)


class HealthyHostTier(NullHostTier):
    """There, and never asked to compute: the simulated runner stands for that, and tells what the
    host did."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.state = HostTierState.UP if blocks else HostTierState.OFF
        self.work = HostWork()


class SimulatedRunner:
    """A `Runner` with a clock instead of a device."""

    def __init__(self, machine: MachineModel, cohorts: int, host: HealthyHostTier) -> None:
        """`cohorts`: sweeps that a host row takes in deferred mode. `host`: told of its work."""
        self._host = host
        self.now = 0.0
        """The time of the engine's thread, seconds."""
        self.sweeps: list[Sweep] = []
        self._machine = machine
        self._device_free = 0.0
        self._cohorts = cohorts
        self._under_way: dict[Flight, int] = {}
        """Host rows between two layers -> tokens that they attend to."""

    def clock(self) -> float:
        return self.now

    def close(self) -> None:
        """Nothing is held."""

    def launch(self, plan: IterationPlan, sampling: Mapping[int, SamplingRow]) -> LaunchedSweep:
        """See `Runner.launch`. Half of the thread's work comes before a sweep, half after it."""
        work = 0.5e-3 * self._machine.host_ms(plan)
        self.now += work
        if plan.mode is Mode.DEFERRED:
            rows = [row for batch in plan.batches for row in batch.host_decode]
            self._under_way.update((Flight(row.key, plan.number), row.length) for row in rows)
        time = self._machine.sweep(plan, list(self._under_way.values()))
        begin = max(self.now, self._device_free)
        self._device_free = begin + 1e-3 * max(time.total, time.link)
        sweep = Sweep(
            begin=begin,
            end=begin + 1e-3 * time.total,
            time=time,
            rows=sum(batch.tokens for batch in plan.batches),
            decode_rows=sum(
                len(b.gpu_decode) + len(b.streamed) + len(b.host_decode) for b in plan.batches
            ),
        )
        self.sweeps.append(sweep)
        self._report(plan, time.cpu)
        if not time.overlaps:
            self.wait(sweep)
        return SimulatedSweep(self, plan, sweep, work, self._land(plan.number))

    def _report(self, plan: IterationPlan, cpu_ms: float) -> None:
        """At once, where the real one tells once a second."""
        if not cpu_ms:
            return
        read: float = sum(row.length for batch in plan.batches for row in batch.host_decode)
        if plan.mode is Mode.DEFERRED:
            read = sum(self._under_way.values()) / self._cohorts
        known = self._host.work
        self._host.work = HostWork(
            known.kv_tokens + read, known.busy_seconds + 1e-3 * cpu_ms, known.sweeps + 1
        )

    def _land(self, number: int) -> tuple[Flight, ...]:
        """The rows that have come through all layers with this plan."""
        landed = [f for f in self._under_way if number - f.started >= self._cohorts - 1]
        for flight in landed:
            del self._under_way[flight]
        return tuple(landed)

    def wait(self, sweep: Sweep) -> None:
        self.now = max(self.now, sweep.end)


class SimulatedSweep:
    """Ends when the clock says so."""

    def __init__(
        self,
        runner: SimulatedRunner,
        plan: IterationPlan,
        sweep: Sweep,
        work: float,
        landed: tuple[Flight, ...],
    ) -> None:
        self._runner, self._plan, self._sweep, self._work = runner, plan, sweep, work
        self._landed = landed

    @property
    def is_done(self) -> bool:
        return not self._sweep.time.overlaps

    def result(self) -> SweepResult:
        """Every row gets its token; none of them ends a request."""
        self._runner.wait(self._sweep)
        self._runner.now += self._work
        keys = [flight.key for flight in self._landed]
        for batch in self._plan.batches:
            starting = batch.host_decode if self._plan.mode is Mode.DEFERRED else ()
            keys += list(batch.sampled_keys)[: -len(starting) or None]
        time = self._sweep.time
        return SweepResult(
            tokens=dict.fromkeys(keys, _TOKEN),
            landed=self._landed,
            # Sweeps with host rows are not timed by their runner.
            device_seconds=1e-3 * time.total if time.overlaps else 0.0,
        )
