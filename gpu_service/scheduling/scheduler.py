"""The scheduler: commands and results in, plans and news out. docs/scheduling.md tells the policy.

submit / abort / host_state ...   whenever they come
plan = schedule(now)              decisions in order: deadlines, growth, promotion, batch, admission
launched(plan)                    the pipeline has begun with it
update(plan, result, now)         tokens, ends, repeats
take_news()                       for the front end
"""

from __future__ import annotations

import heapq
import itertools

from gpu_service.engine.messages import Submit, TokenLogprob
from gpu_service.offload.host_tier import HostTierState
from gpu_service.scheduling import admission, residency, reuse
from gpu_service.scheduling.batching import BatchBuilder, add_chunks, add_decoding
from gpu_service.scheduling.budget import bound_chunks
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.limits import SchedulerLimits
from gpu_service.scheduling.news import News
from gpu_service.scheduling.plan import (
    Failure,
    IterationPlan,
    Migration,
    Mode,
    SampledToken,
    SweepResult,
    Tier,
)
from gpu_service.scheduling.predictor import Predictor
from gpu_service.scheduling.rates import NO_HOST, HostRates
from gpu_service.scheduling.request import Choice, ChoiceState, Request
from gpu_service.scheduling.state import SchedulerState
from gpu_service.scheduling.steering import Steering

QUEUE_FULL_RETRY_SECONDS = 1.0
"""When to come back after a full queue, until something better is known."""
HOST_AVERAGE_WEIGHT = 0.2
"""Of the newest iteration in the moving average of iterations with host rows."""


class Scheduler:
    """Not thread-safe. Times are seconds of one monotonic clock, given by the caller."""

    def __init__(
        self,
        limits: SchedulerLimits,
        costs: SweepCosts | None = None,
        rates: HostRates | None = None,
    ) -> None:
        """`costs`: what sweeps take, by which prompts are cut into chunks; None makes chunks as
        large as the limits allow. `rates`: what the host tier takes."""
        limits.validate()
        self.costs = costs
        self.state = SchedulerState(limits)
        predictor = Predictor(costs, rates or NO_HOST) if costs is not None else None
        self.steering = Steering(self.state, predictor)
        self.limits = limits
        self.iterations = 0
        self._keys = itertools.count()
        self._unstarted: dict[str, Request] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._prompt_logprobs: dict[int, list[TokenLogprob]] = {}
        self._host_away_since: float | None = None
        self._host_lost = False
        self._host_works = False
        """On rows of the last sweep, in blocks that may be given up meanwhile; not as flights."""
        self._news = News()

    # -- commands ----------------------------------------------------------------------------

    def submit(self, submit: Submit, now: float) -> Request | None:
        """Queue a request, or refuse it (in the news) and return None."""
        assert submit.request_id not in self.state.requests, "the front end keeps ids unique"
        keys = [next(self._keys) for _ in range(submit.sampling.n)]
        tiers = self.state.tiers_for(submit)
        request = Request(
            submit, tiers, self.limits.max_context_tokens, keys[0], self.state.new_keys(submit)
        )
        failure = admission.refuse(self.state, request, len(self._unstarted))
        if submit.deadline is not None and submit.deadline <= now:
            failure = _DEADLINE
        if failure is not None:
            retry = QUEUE_FULL_RETRY_SECONDS if failure.reason == "QUEUE_FULL" else None
            self._news.refuse(submit.request_id, failure, retry)
            return None
        self.state.requests[submit.request_id] = request
        self._unstarted[submit.request_id] = request
        self.state.waiting.push(request.choices[0])
        if submit.deadline is not None:
            self._watch_deadline(submit.deadline, submit.request_id)
        return request

    def abort(self, request_id: str, index: int | None, now: float) -> None:
        """End a request, or one choice of it, in whatever state it is. Unknown ones are ignored."""
        request = self.state.requests.get(request_id)
        if request is None:
            return
        if index is None:
            self._end(request)
            return
        if index < len(request.choices):
            choice = request.choices[index]
            if choice.state is not ChoiceState.FINISHED:
                self._finish_choice(choice, now)

    def forget_prefixes(self) -> None:
        """Let nobody who is submitted from now on find KV of those before."""
        self.state.forget_prefixes()

    def host_state(self, host: HostTierState, now: float) -> None:
        """What the host tier is like now; call it before each `schedule`."""
        state = self.state
        if self.limits.host_blocks == 0:
            return
        state.host_up = host is HostTierState.UP
        if state.host_up:
            self._host_away_since, self._host_lost = None, False
            return
        if self._host_away_since is None:
            self._host_away_since = now
        if host.is_lost and not self._host_lost:
            self._host_lost = True
            state.pools[Tier.HOST].forget()
            for choice in state.running_on(Tier.HOST):
                if choice.state is not ChoiceState.RUNNING:
                    continue  # it ended with another choice of its request
                if host is HostTierState.EXPIRED:
                    self._fail(choice.request, _HOST_LOST)
                else:
                    # It may go on elsewhere, or here once the host tier is back.
                    state.preempt(choice)
        away = now - self._host_away_since >= self.limits.lease_seconds
        if host is HostTierState.EXPIRED or (away and host is not HostTierState.DEGRADED):
            self._end_host_only()

    def _end_host_only(self) -> None:
        """The host tier stayed away for a lease: whoever can be nowhere else ends."""
        gpu_tokens = self.state.pools[Tier.GPU].total * self.limits.block_tokens
        for choice in list(self.state.waiting):
            gpu_is_possible = Tier.GPU in choice.request.tiers and choice.length <= gpu_tokens
            if choice.state is ChoiceState.WAITING and not gpu_is_possible:
                self._fail(choice.request, _HOST_LOST)

    # -- the iteration -----------------------------------------------------------------------

    def schedule(self, now: float) -> IterationPlan:
        """Decide the next iteration. Blocks change hands here.

        The sweep before it may still be running if `may_look_ahead`: whatever it draws is then
        pending."""
        self.iterations += 1
        state = self.state
        state.left()
        self._drop_expired(now)
        self.steering.revise(self.iterations)
        migrations = residency.force(state, self.iterations)
        migrations += residency.grow(state)
        if not migrations and not self.limits.force_migration_every:
            migrations += residency.send_down(state) or residency.promote(state)
        batch = BatchBuilder(self.limits.max_batch_tokens, self.iterations, self.limits)
        add_decoding(state, batch)
        bound_chunks(state, self.costs, batch)
        add_chunks(state, batch)
        admitted = admission.admit(state, batch)
        for choice in admitted.choices:
            request = choice.request
            self._unstarted.pop(request.request_id, None)
            if request.first_planned is None:
                request.first_planned = now
        batches = batch.build()
        mode, batches = self.steering.lay_out(batches)
        return IterationPlan(
            number=self.iterations,
            mode=mode,
            migrations=(*self._still_valid(migrations), *admitted.copies),
            batches=batches,
        )

    def _still_valid(self, migrations: list[Migration]) -> tuple[Migration, ...]:
        """Without those of choices that were preempted after all.

        Running them would be harmless: whoever has their target blocks now fills them later in the
        same iteration."""
        running = self.state.running_by_key
        return tuple(
            m
            for m in migrations
            if m.tokens and m.key in running and running[m.key].computed == m.tokens
        )

    @property
    def may_look_ahead(self) -> bool:
        """The next iteration can be decided without the result of the one that runs.

        Not so with host rows, whose results may be void, unless they are deferred and the device
        itself deals with them: what is under way is then left alone until it lands, and what has
        come to nothing is heard of a sweep late. Nor where the next draw is not the device's own
        and depends on the last."""
        limits = self.limits
        if self._host_works:
            return False
        device_deals = limits.cohorts > 0 and (limits.staged_prompts or not limits.host_prefill)
        if self.state.flights and not device_deals:
            return False
        return all(
            (choice.tier is Tier.GPU or device_deals) and not choice.request.follows_output
            for choice in self.state.running
        )

    def launched(self, plan: IterationPlan) -> None:
        """The plan's sweep has begun: its rows count as computed from now on."""
        self._take_off(plan)
        self.steering.launched(plan)

    def _take_off(self, plan: IterationPlan) -> None:
        self.state.launched = plan.number
        deferred = plan.mode is Mode.DEFERRED
        self._host_works = not deferred and any(batch.host_decode for batch in plan.batches)
        for batch in plan.batches:
            for chunk in batch.prefill:
                self._launch(chunk.key, len(chunk.token_ids))
            for row in itertools.chain(batch.gpu_decode, batch.streamed, batch.host_decode):
                self._launch(row.key, 1)
            if deferred:
                for row in batch.host_decode:
                    self.state.take_off(self.state.running_by_key[row.key], plan.number)

    def _launch(self, key: int, tokens: int) -> None:
        choice = self.state.running_by_key[key]
        choice.computed += tokens
        choice.pending += choice.computed == choice.length

    def update(
        self, plan: IterationPlan, result: SweepResult, now: float, seconds: float = 0.0
    ) -> None:
        """Take in what became of a plan that was `launched`; plans come in their order. `seconds`:
        what the iteration took; 0 where nobody has measured."""
        self.steering.observe(plan, result, seconds)
        for key in result.lost:
            choice = self.state.running_by_key.get(key)
            if choice is not None:
                self.state.preempt(choice)
        for batch in plan.batches:
            for chunk in batch.prefill:
                if chunk.start == 0:  # maybe anew, since its KV was thrown away half-way
                    self._prompt_logprobs.pop(chunk.key, None)
                self._arrive(plan, chunk.key, chunk.tier, len(chunk.token_ids), result, now)
            for row in itertools.chain(batch.gpu_decode, batch.streamed):
                self._arrive(plan, row.key, Tier.GPU, 1, result, now)
            if plan.mode is not Mode.DEFERRED:
                for row in batch.host_decode:
                    self._arrive(plan, row.key, Tier.HOST, 1, result, now)
        for flight in result.landed:
            choice = self.state.land(flight)
            if choice is None:
                continue
            if flight.key in result.tokens or flight.key in result.failed:
                self._arrive(plan, flight.key, Tier.HOST, 1, result, now)
            else:
                choice.pending -= 1
                choice.computed -= 1

    def observe_host_sweep(self, milliseconds: float, mode: Mode) -> None:
        """How long an iteration with host decode rows took, of which a row takes as many as there
        are cohorts; decides who may promise a tpot on the host tier."""
        average = self.state.host_sweep_ms
        if mode is Mode.DEFERRED:
            milliseconds *= self.limits.cohorts
        self.state.host_sweep_ms = (
            milliseconds
            if average is None
            else average + HOST_AVERAGE_WEIGHT * (milliseconds - average)
        )

    def take_news(self) -> News:
        news, self._news = self._news, News()
        return news

    # -- questions ---------------------------------------------------------------------------

    @property
    def live_requests(self) -> int:
        return len(self.state.requests)

    @property
    def stalled_choices(self) -> int:
        """Choices that hold host blocks while the host tier is away."""
        return 0 if self.state.host_up else len(self.state.running_on(Tier.HOST))

    @property
    def waiting_requests(self) -> int:
        return len(self._unstarted)

    @property
    def waiting_prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self._unstarted.values())

    # -- within ------------------------------------------------------------------------------

    def _arrive(
        self,
        plan: IterationPlan,
        key: int,
        tier: Tier,
        tokens: int,
        result: SweepResult,
        now: float,
    ) -> None:
        """A row's result; those of choices that ended or began anew meanwhile do not count."""
        choice = self.state.running_by_key.get(key)
        if choice is None or plan.number <= choice.forgotten:
            return
        failure = result.failed.get(key)
        if failure is not None:
            self._fail(choice.request, failure)
        elif key in result.void:
            assert plan.number == self.state.launched, "sweeps that may be void are not overlapped"
            choice.pending = 0
            choice.computed -= tokens
        else:
            self._collect_prompt_logprobs(choice, result)
            choice.confirmed += tokens
            if choice.confirmed >= (choice.published + 1) * self.limits.block_tokens:
                reuse.publish(self.state, choice, plan.number)
            if key in result.tokens:
                self._accept(choice, tier, result.tokens[key], now)

    def _accept(self, choice: Choice, tier: Tier, token: SampledToken, now: float) -> None:
        request = choice.request
        request.tokens[tier] += 1
        if request.first_token is None:
            request.first_token = now
        if len(request.choices) > 1:
            self.state.release_held(request)
        finish, stop_token_id = choice.accept(token.token_id, self.limits.eos_token_ids)
        self._news.token(choice, token, finish, stop_token_id)
        if finish is not None:
            self.steering.ended(choice)
            self._finish_choice(choice, now)

    def _collect_prompt_logprobs(self, choice: Choice, result: SweepResult) -> None:
        request = choice.request
        if not request.wants_prompt_logprobs or choice.index != 0:
            return
        collected = self._prompt_logprobs.setdefault(choice.key, [])
        collected.extend(result.prompt_logprobs.get(choice.key, ()))
        # Not by what is computed: the sweep that computes the rest may still be running.
        if len(collected) == len(request.prompt) - 1:
            self._news.prompt(request, self._prompt_logprobs.pop(choice.key))
            request.wants_prompt_logprobs = False

    def _finish_choice(self, choice: Choice, now: float) -> None:
        self._prompt_logprobs.pop(choice.key, None)
        self.state.finish(choice)
        if choice.request.is_finished:
            self._unstarted.pop(choice.request.request_id, None)
            self._news.usage(choice.request, now)

    def _fail(self, request: Request, failure: Failure) -> None:
        self._end(request)
        self._news.refuse(request.request_id, failure)

    def _end(self, request: Request) -> None:
        self._unstarted.pop(request.request_id, None)
        for choice in tuple(request.choices):
            if choice.state is not ChoiceState.FINISHED:
                self._prompt_logprobs.pop(choice.key, None)
                self.state.finish(choice)

    def _watch_deadline(self, deadline: float, request_id: str) -> None:
        heapq.heappush(self._deadlines, (deadline, request_id))
        # Requests end long before distant deadlines: keep no more of the ended ones than there are
        # live ones.
        if len(self._deadlines) > 2 * len(self.state.requests) + 64:
            live = self.state.requests.values()
            self._deadlines = [
                (r.submit.deadline, r.request_id) for r in live if r.submit.deadline is not None
            ]
            heapq.heapify(self._deadlines)

    def _drop_expired(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            request = self.state.requests.get(request_id)
            # The id may have been used again by a request with another deadline.
            if request is not None and request.submit.deadline == deadline:
                self._fail(request, _DEADLINE)


_DEADLINE = Failure("DEADLINE_EXCEEDED", "the request's deadline has passed")
_HOST_LOST = Failure(
    "HOST_TIER_LOST",
    "the cpu_service that held this request's KV did not come back within its lease",
)
