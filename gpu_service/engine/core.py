"""The engine core's loop body: commands in, one iteration, what there is to say out.

Free of processes and sockets: tests and benchmarks drive it directly, `core_process` drives it from
a front end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from gpu_service.engine.counters import WorkCounters
from gpu_service.engine.messages import (
    Abort,
    Command,
    ForgetPrefixes,
    Load,
    Output,
    Shutdown,
    Submit,
    TierLoad,
)
from gpu_service.engine.statistics import IterationStatistics, LoadRates
from gpu_service.engine.traces import RequestTraces
from gpu_service.model.sampling import SamplingRow
from gpu_service.model.structured import Guide, Guides
from gpu_service.offload.host_tier import HostTier, HostTierState
from gpu_service.pipeline.launch import LaunchedSweep, Runner
from gpu_service.scheduling.plan import IterationPlan, Mode, SweepResult, Tier
from gpu_service.scheduling.request import Choice
from gpu_service.scheduling.scheduler import Scheduler

_LOG = logging.getLogger(__name__)


class SamplingRows(Mapping[int, SamplingRow]):
    """Choice -> its row for the sampler, made once; the row follows the choice's output as it
    grows."""

    def __init__(self, running: Mapping[int, Choice], guides: Guides | None) -> None:
        self._running = running
        self._guides = guides
        self._rows: WeakKeyDictionary[Choice, SamplingRow] = WeakKeyDictionary()

    def __getitem__(self, key: int) -> SamplingRow:
        choice = self._running[key]
        row = self._rows.get(choice)
        if row is None:
            request = choice.request
            spec = request.submit.sampling
            row = SamplingRow(
                spec, request.prompt, choice.output, choice.index, self._guide(spec.grammar)
            )
            self._rows[choice] = row
        return row

    def _guide(self, grammar: str) -> Guide | None:
        if not grammar:
            return None
        assert self._guides is not None, "the front end sends grammars only where they are served"
        return self._guides.guide(grammar)

    def __iter__(self) -> Iterator[int]:
        return iter(self._running)

    def __len__(self) -> int:
        return len(self._running)


Observer = Callable[[IterationPlan, SweepResult, float], None]
"""`observe(plan, result, seconds)`, once the result has been taken in."""


@dataclass(frozen=True)
class _Flight:
    """An iteration whose result has not been taken in."""

    plan: IterationPlan
    sweep: LaunchedSweep
    started: float


class EngineCore:
    """Owns the scheduler, the runner and the host tier. One thread.

    While one sweep runs the next one is decided, prepared and queued behind it (the sampled tokens
    stay on the device), wherever the runner and the scheduler can do without its result:

        schedule n+1 | launch n+1 | take in n | schedule n+2 | ...
        device: == sweep n ===============|== sweep n+1 =========

    while not core.is_done:
        core.handle(command) ...
        output = core.step()
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        host: HostTier,
        vocab_size: int,
        clock: Callable[[], float] = time.monotonic,
        guides: Guides | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.host = host
        self.vocab_size = vocab_size
        self._runner = runner
        self._clock = clock
        self._guides = guides
        self._sampling = SamplingRows(scheduler.state.running_by_key, guides)
        self._statistics = IterationStatistics()
        self._rates = LoadRates()
        self._work = WorkCounters()
        self._traces = RequestTraces()
        self._tokens = dict.fromkeys(Tier, 0)
        self._stopping = False
        self._last_load: Load | None = None
        self._flight: _Flight | None = None
        self.observe: Observer | None = None
        """Told of each iteration, for measurements."""
        self._landed_at = 0.0
        self.made_progress = False
        """The last `step` ran something, so the next one may have something to run, too."""

    @property
    def is_done(self) -> bool:
        """Shutdown was asked for and no request is left."""
        return self._stopping and self.scheduler.live_requests == 0

    @property
    def runner(self) -> Runner:
        return self._runner

    def handle(self, command: Command) -> None:
        """Take in one command; what it leads to comes out of the next `step`."""
        if isinstance(command, Submit):
            if command.request_id in self.scheduler.state.requests:
                # Refusing it would end the live one, whose id it carries.
                _LOG.error("the front end submitted a request id twice; the second is ignored")
                return
            if command.sampling.grammar and self._guides is not None:
                self._guides.prepare(command.sampling.grammar)  # compiles while the request waits
            request = self.scheduler.submit(command, self._clock())
            if request is not None and command.traced:
                self._traces.begin(request)
        elif isinstance(command, Abort):
            if command.index is None:
                self._traces.end(command.request_id)
            self.scheduler.abort(command.request_id, command.index, self._clock())
        elif isinstance(command, ForgetPrefixes):
            self.scheduler.forget_prefixes()
        else:
            assert isinstance(command, Shutdown)
            self._stopping = True

    def step(self) -> Output | None:
        """One iteration, if anything can run; None when there is nothing new to say."""
        self.made_progress = self._flight is not None
        if not self.scheduler.may_look_ahead:
            self._land()
        started = self._clock()
        self.host.poll()
        self.scheduler.steering.observe_host(self.host.work)
        self.scheduler.host_state(self.host.state, started)
        plan = self.scheduler.schedule(started)
        if plan.is_empty:
            self._land()
        else:
            self.made_progress = True
            flight = _Flight(plan, self._runner.launch(plan, self._sampling), started)
            self.scheduler.launched(plan)
            self._land()
            self._flight = flight
            if flight.sweep.is_done:
                self._land()
        if self.scheduler.live_requests == 0 and self._flight is None:
            self._statistics.idle()
        return self._output()

    def _land(self) -> None:
        """Wait for the sweep in flight, if there is one, and take its result in."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            result = flight.sweep.result()
            self._count(flight.plan, result, max(flight.started, self._landed_at))
            self._landed_at = self._clock()

    def close(self) -> None:
        """End the session with the cpu_service."""
        if self._guides is not None:
            self._guides.close()
        self._runner.close()
        self.host.close()

    def _count(self, plan: IterationPlan, result: SweepResult, started: float) -> None:
        now = self._clock()
        hosts = {flight.key for flight in result.landed}
        for batch in plan.batches:
            hosts.update(row.key for row in batch.prefill if row.tier is Tier.HOST)
            if plan.mode is not Mode.DEFERRED:
                hosts.update(row.key for row in batch.host_decode)
        on_host = sum(key in hosts for key in result.tokens)
        self._tokens[Tier.HOST] += on_host
        self._tokens[Tier.GPU] += len(result.tokens) - on_host
        if any(batch.host_decode for batch in plan.batches) and not result.void:
            self.scheduler.observe_host_sweep(1e3 * (now - started), plan.mode)
        self.scheduler.update(plan, result, now, now - started)
        self._statistics.observe(now - started, len(result.tokens))
        self._rates.observe(plan, self.scheduler.state.given_back_tokens, now - started)
        self._work.count(plan, result, now - started)
        self._traces.count(plan, result, started, now)
        if self.observe is not None:
            self.observe(plan, result, now - started)

    def _output(self) -> Output | None:
        news, load = self.scheduler.take_news(), self._load()
        idle = self._flight is None and not self.made_progress
        recomputed = self.scheduler.state.recomputed_tokens
        steering = self.scheduler.steering
        counters = self._work.report(self._clock(), recomputed, steering, idle=idle)
        if not news and load == self._last_load and counters is None:
            return None
        self._last_load = load
        for refusal in news.refusals:
            self._traces.end(refusal.request_id)
        return Output(
            deltas=news.deltas,
            prompt_logprobs=news.prompt_logprobs,
            usages=self._traces.attach(news.usages),
            refusals=news.refusals,
            load=load,
            counters=counters,
        )

    def _load(self) -> Load:
        scheduler, state = self.scheduler, self.scheduler.state
        host = self.host.state
        return Load(
            host_tier_state=(HostTierState.LOST if host.is_lost else host).value,
            gpu=self._tier_load(Tier.GPU),
            host=self._tier_load(Tier.HOST),
            waiting_requests=scheduler.waiting_requests,
            waiting_prompt_tokens=scheduler.waiting_prompt_tokens,
            block_tokens=scheduler.limits.block_tokens,
            demotions_total=state.migrations[Tier.HOST],
            promotions_total=state.migrations[Tier.GPU],
            recomputations_total=state.recomputations,
            iterations_total=self._statistics.iterations,
            iteration_seconds=self._statistics.iteration_seconds,
            output_tokens_per_second=self._statistics.tokens_per_second,
            prompt_tokens_per_second=self._rates.prompt_tokens_per_second,
            prefix_query_tokens_total=state.prefix_tokens.queried,
            prefix_hit_tokens_total=state.prefix_tokens.found,
            prefix_host_hit_tokens_total=state.prefix_tokens.found_on_host,
        )

    def _token_seconds(self, tier: Tier) -> float:
        if tier is Tier.GPU:
            return self._statistics.iteration_seconds
        return (self.scheduler.state.host_sweep_ms or 0.0) / 1e3

    def _tier_load(self, tier: Tier) -> TierLoad:
        pool = self.scheduler.state.pools[tier]
        return TierLoad(
            total_blocks=pool.total,
            free_blocks=pool.free_count,
            running_requests=sum(c.tier is tier for c in self.scheduler.state.running),
            tokens_total=self._tokens[tier],
            freed_tokens_per_second=self._rates.freed_tokens_per_second(tier),
            token_seconds=self._token_seconds(tier),
            cached_blocks=pool.idle_count,
        )
