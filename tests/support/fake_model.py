"""A machine without a model: runs plans by a fake clock, and checks each of them against its own
books.

Tokens are a function of (prompt, position) alone, so that any scheduling must give the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gpu_service.engine.messages import RequestUsage, SamplingSpec, Submit, TokenLogprob
from gpu_service.kv.table import blocks_for
from gpu_service.offload.host_tier import HostTierState
from gpu_service.scheduling.limits import SchedulerLimits
from gpu_service.scheduling.plan import (
    PENDING_TOKEN,
    Flight,
    IterationPlan,
    Mode,
    SampledToken,
    SweepResult,
    Tier,
)
from gpu_service.scheduling.scheduler import Scheduler


def token_at(prompt: list[int], position: int) -> int:
    """The token that follows position `position` of a sequence with that prompt."""
    return 1000 + (sum(prompt) * 31 + position * 7) % 997


def limits(**changes: object) -> SchedulerLimits:
    values: dict[str, object] = {
        "gpu_blocks": 16,
        "host_blocks": 32,
        "block_tokens": 4,
        "max_context_tokens": 128,
        "max_batch_tokens": 24,
        "max_running": 16,
        "prefix_caching": True,
        "eos_token_ids": frozenset({7}),
    }
    return SchedulerLimits(**{**values, **changes})  # type: ignore[arg-type]


def submit(
    request_id: str,
    prompt_tokens: int,
    max_tokens: int,
    *,
    arrival: float = 0.0,
    n: int = 1,
    deadline: float | None = None,
    placement: str = "auto",
    priority: int = 0,
    **sampling: object,
) -> Submit:
    prompt = [1 + (hash_of(request_id) + i) % 900 for i in range(prompt_tokens)]
    return Submit(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingSpec(max_tokens=max_tokens, n=n, **sampling),  # type: ignore[arg-type]
        arrival=arrival,
        deadline=deadline,
        placement=placement,
        priority=priority,
    )


def hash_of(text: str) -> int:
    """Stable over runs, unlike `hash`."""
    return sum(ord(c) * 131**i for i, c in enumerate(text)) % 100_003


def sweep_seconds(plan: IterationPlan) -> float:
    """A machine whose two tiers are equally fast: a weight pass, then a little for each token."""
    tokens = sum(batch.tokens for batch in plan.batches)
    moved = sum(m.tokens for m in plan.migrations)
    return 5e-3 + 1e-5 * tokens + 1e-6 * moved


@dataclass
class Books:
    """What each choice's KV must be by now, kept apart from the scheduler: block -> whose, token
    range."""

    stored: dict[tuple[Tier, int], dict[int, tuple[int, ...]]] = field(default_factory=dict)
    """(tier, block) -> offset -> the tokens up to and including that one."""


@dataclass
class Airborne:
    """A host row under way in deferred mode: from now until it lands the host may append to its
    table, whether or not anybody still wants it."""

    table: list[int]
    tokens: tuple[int, ...]
    """Known ones, the row's own the last."""
    sweeps: int
    """How many more."""


Spoil = Callable[[IterationPlan, SweepResult], SweepResult]


class Machine:
    """Drives a scheduler. Every plan is executed on the books, so that a row that reads KV which is
    not there, or somebody else's, is found at once."""

    def __init__(
        self,
        scheduler: Scheduler,
        seconds: Callable[[IterationPlan], float] = sweep_seconds,
        look_ahead: bool = False,
    ) -> None:
        """`look_ahead`: results come one iteration late wherever the scheduler allows it."""
        self.scheduler = scheduler
        self.now = 0.0
        self.host = HostTierState.UP
        self.plans: list[IterationPlan] = []
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.finished: dict[tuple[str, int], str] = {}
        self.refused: dict[str, str] = {}
        self.usages: dict[str, RequestUsage] = {}
        self.first_token: dict[str, float] = {}
        self.prompt_tokens: dict[str, list[int]] = {}
        """Of those that asked for log probabilities of their prompt: whose they were told."""
        self._choices: dict[str, int] = {}
        self._seconds = seconds
        self._books = Books()
        self._look_ahead = look_ahead
        self._air: dict[Flight, Airborne] = {}
        self.stalls = False
        """The host tier does not answer in time: rows under way come to nothing."""
        self._flight: tuple[IterationPlan, SweepResult] | None = None
        self.looked_ahead = 0

    def submit(self, request: Submit) -> None:
        self._choices[request.request_id] = request.sampling.n
        self.scheduler.submit(request, self.now)

    def step(self, spoil: Spoil | None = None) -> bool:
        """One iteration; False when nothing could run. `spoil` may replace the result."""
        landed = not self.scheduler.may_look_ahead and self._land()
        self.looked_ahead += self._flight is not None
        self.scheduler.host_state(self.host, self.now)
        plan = self.scheduler.schedule(self.now)
        self.plans.append(plan)
        self.scheduler.state.check_integrity()
        if plan.is_empty:
            landed = self._land() or landed
            self._hear()
            return landed
        self._check_limits(plan)
        self.now += self._seconds(plan)
        result = self._run(plan)
        if spoil is not None:
            result = spoil(plan, result)
        self.scheduler.launched(plan)
        self.scheduler.state.check_integrity()
        self._land()
        self._flight = plan, result
        if not self._look_ahead or result.void or result.lost:
            self._land()
        self.scheduler.state.check_integrity()
        self._hear()
        return True

    def _land(self) -> bool:
        if self._flight is None:
            return False
        plan, result = self._flight
        self._flight = None
        self.scheduler.update(plan, result, self.now)
        return True

    def run(self, steps: int = 10_000) -> None:
        """Until nothing is live."""
        for _ in range(steps):
            if not self.scheduler.live_requests:
                return
            assert self.step(), "live requests, but nothing can run"
        raise AssertionError("requests starve")

    def lose_host(self) -> None:
        """What was in the host pool is gone."""
        for place in [place for place in self._books.stored if place[0] is Tier.HOST]:
            del self._books.stored[place]

    def check_empty(self) -> None:
        """Nothing is held any more, once what is under way has landed."""
        self.host, self.stalls = HostTierState.UP, False
        for _ in range(self.scheduler.limits.cohorts):
            self.step()
        assert not self._air
        for pool in self.scheduler.state.pools.values():
            assert pool.used_count == 0, "blocks leaked"

    def _check_limits(self, plan: IterationPlan) -> None:
        bounds = self.scheduler.limits
        assert sum(batch.tokens for batch in plan.batches) <= bounds.max_batch_tokens
        assert len(self.scheduler.state.running) <= bounds.running_bound
        keys = [
            row.key
            for batch in plan.batches
            for row in (*batch.prefill, *batch.gpu_decode, *batch.streamed, *batch.host_decode)
        ]
        assert len(keys) == len(set(keys)), "a choice has two rows in one iteration"
        assert all(batch.tokens for batch in plan.batches)
        assert len(plan.batches) <= (2 if plan.mode is Mode.ASYMMETRIC else 1)
        streamed = [row for batch in plan.batches for row in batch.streamed]
        read = sum(blocks_for(row.length, bounds.block_tokens) for row in streamed)
        if bounds.staged_prompts:
            chunks = [row for b in plan.batches for row in b.prefill if row.tier is Tier.HOST]
            ends = [row.start + len(row.token_ids) for row in chunks]
            read += sum(blocks_for(end, bounds.block_tokens) for end in ends)
        assert read <= bounds.streamed_blocks
        for batch in plan.batches if bounds.cohort_rows else ():
            assert len(batch.host_decode) <= bounds.cohort_rows
        if plan.mode is Mode.ASYMMETRIC:
            second = plan.batches[1]
            assert second.tokens == len(second.host_decode) > 0, "it attends on the device"
        if self.host is not HostTierState.UP:
            assert not any(batch.host_decode or batch.streamed for batch in plan.batches)
            assert all(row.tier is Tier.GPU for b in plan.batches for row in b.prefill)
            assert not plan.migrations

    # -- the books ---------------------------------------------------------------------------

    def _run(self, plan: IterationPlan) -> SweepResult:
        size = self.scheduler.limits.block_tokens
        # Copies beside the sweep may take until its end.
        if not plan.copies_beside:
            self._copy(plan)
        tokens: dict[int, SampledToken] = {}
        logprobs: dict[int, list[TokenLogprob]] = {}
        landed, void = self._fly(plan, tokens)
        for batch in plan.batches:
            for chunk in batch.prefill:
                if chunk.logprob_targets:
                    told = [TokenLogprob(token, -1.0, 1, []) for token in chunk.logprob_targets]
                    logprobs[chunk.key] = told
                end = chunk.start + len(chunk.token_ids)
                self._store(chunk.key, chunk.tier, chunk.blocks, chunk.start, end, size)
                if chunk.samples:
                    tokens[chunk.key] = self._next(chunk.key, end)
            decode = [(Tier.GPU, r) for r in batch.gpu_decode]
            decode += [(Tier.HOST, r) for r in batch.streamed]
            if plan.mode is not Mode.DEFERRED:
                decode += [(Tier.HOST, r) for r in batch.host_decode]
            for tier, row in decode:
                start = row.length - 1
                choice = self.scheduler.state.running_by_key[row.key]
                known = PENDING_TOKEN if choice.pending else self._known(row.key)[-1]
                assert row.token_id == known
                self._store(row.key, tier, row.blocks, start, row.length, size)
                tokens[row.key] = self._next(row.key, row.length)
        if plan.copies_beside:
            self._copy(plan)
        return SweepResult(tokens=tokens, prompt_logprobs=logprobs, landed=landed, void=void)

    def _copy(self, plan: IterationPlan) -> None:
        for move in plan.migrations:
            source = move.target.other
            for old, new in zip(move.source_blocks, move.target_blocks, strict=True):
                kept = self._books.stored.get((source, int(old)), {})
                self._books.stored[move.target, int(new)] = dict(kept)

    def _fly(
        self, plan: IterationPlan, tokens: dict[int, SampledToken]
    ) -> tuple[tuple[Flight, ...], frozenset[int]]:
        """Move on what is under way; which rows have landed, and which of them have come to
        nothing."""
        if plan.mode is not Mode.DEFERRED:
            assert not self._air, "rows are under way, and nobody moves them on"
            return (), frozenset()
        for batch in plan.batches:
            for row in batch.host_decode:
                known = self._known(row.key)
                choice = self.scheduler.state.running_by_key[row.key]
                assert row.token_id == (PENDING_TOKEN if choice.pending else known[-1])
                table = [int(block) for block in row.blocks]
                sweeps = self.scheduler.limits.cohorts
                self._air[Flight(row.key, plan.number)] = Airborne(table, known, sweeps)
        void = self.stalls or self.host is not HostTierState.UP
        landed = []
        for flight, row in self._air.items():
            row.sweeps -= 1
            if not void:
                self._append(row)
            if void or row.sweeps == 0:
                landed.append(flight)
                if not void and flight.key in self.scheduler.state.running_by_key:
                    tokens[flight.key] = self._next(flight.key, len(row.tokens))
        for flight in landed:
            del self._air[flight]
        return tuple(landed), frozenset(f.key for f in landed if void)

    def _append(self, row: Airborne) -> None:
        size, last = self.scheduler.limits.block_tokens, len(row.tokens) - 1
        for position in range(last):
            place = self._books.stored.get((Tier.HOST, row.table[position // size]), {})
            assert place.get(position % size) == row.tokens[: position + 1], "wrong KV is read"
        place = self._books.stored.setdefault((Tier.HOST, row.table[last // size]), {})
        place[last % size] = row.tokens

    def _known(self, key: int) -> tuple[int, ...]:
        choice = self.scheduler.state.running_by_key[key]
        sure = choice.length - choice.pending
        prompt = choice.request.prompt
        drawn = (token_at(prompt, position) for position in range(sure, choice.length))
        return (*choice.token_ids(0, sure), *drawn)

    def _store(self, key: int, tier: Tier, blocks: object, start: int, end: int, size: int) -> None:
        """Check that KV of all tokens before `start` is there, then store up to `end`."""
        table = [int(block) for block in blocks]  # type: ignore[attr-defined]
        known = self._known(key)
        for position in range(start):
            place = self._books.stored.get((tier, table[position // size]), {})
            assert place.get(position % size) == known[: position + 1], "wrong KV is read"
        for position in range(start, end):
            place = self._books.stored.setdefault((tier, table[position // size]), {})
            place[position % size] = known[: position + 1]

    def _next(self, key: int, length: int) -> SampledToken:
        prompt = self.scheduler.state.running_by_key[key].request.prompt
        return SampledToken(token_at(prompt, length))

    def _hear(self) -> None:
        news = self.scheduler.take_news()
        for prompt in news.prompt_logprobs:
            assert prompt.request_id not in self.prompt_tokens, "told twice"
            self.prompt_tokens[prompt.request_id] = [entry.token_id for entry in prompt.logprobs]
        for delta in news.deltas:
            key = (delta.request_id, delta.index)
            assert key not in self.finished, "output after the end"
            self.first_token.setdefault(delta.request_id, self.now)
            self.outputs.setdefault(key, []).extend(delta.token_ids)
            if delta.finish is not None:
                self.finished[key] = delta.finish
        for usage in news.usages:
            assert usage.request_id not in self.usages, "two ends"
            self.usages[usage.request_id] = usage
            self._check_usage(usage)
        for refusal in news.refusals:
            assert refusal.request_id not in self.refused
            self.refused[refusal.request_id] = refusal.reason

    def _check_usage(self, usage: RequestUsage) -> None:
        """It adds up, whatever happened to the request."""
        heard = sum(len(t) for (name, _), t in self.outputs.items() if name == usage.request_id)
        assert usage.completion_tokens == heard
        assert usage.gpu_tokens + usage.host_tokens == heard
        assert usage.queue_seconds <= usage.ttft_seconds
        # Each choice goes to and fro; one that is computed again begins anew.
        begun = self._choices[usage.request_id] + usage.recomputations
        assert abs(usage.demotions - usage.promotions) <= begun


def expected_output(request: Submit) -> list[int]:
    """What a choice must say, however it is scheduled (no stop ids)."""
    prompt = request.prompt_token_ids
    return [token_at(prompt, len(prompt) + i) for i in range(request.sampling.max_tokens)]


def machine_with(**changes: object) -> Machine:
    return Machine(Scheduler(limits(**changes)))


def tiers(machine: Machine) -> dict[str, Tier | None]:
    return {c.request.request_id: c.tier for c in machine.scheduler.state.running}
