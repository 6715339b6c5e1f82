"""The rows of one iteration: decode first, then chunks of prompts within what is left of the token
budget."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_service.kv.table import blocks_for
from gpu_service.scheduling.limits import SchedulerLimits
from gpu_service.scheduling.plan import DecodeRow, PrefillRow, SubBatch, Tier
from gpu_service.scheduling.request import Choice
from gpu_service.scheduling.state import SchedulerState
from gpu_service.scheduling.streaming import streamed
from gpu_service.scheduling.work import DEFERRED, GPU_ONLY


class BatchBuilder:
    """Collects the rows of one sub-batch within a token budget, and within staging."""

    def __init__(self, budget: int, iteration: int, limits: SchedulerLimits) -> None:
        self.budget = budget
        """Tokens that may still be added."""
        self.chunks = limits.max_running
        """Prompts of which a chunk may still be."""
        self._staging = limits.streamed_blocks
        """Blocks that staging still has room for."""
        self._limits = limits
        self._iteration = iteration
        self._prefill: list[PrefillRow] = []
        self._decode: dict[Tier, list[DecodeRow]] = {tier: [] for tier in Tier}
        self._streamed: list[DecodeRow] = []

    @property
    def device_rows(self) -> tuple[int, int]:
        """Decode rows that attend on the device, and the tokens that they attend to."""
        rows = (*self._decode[Tier.GPU], *self._streamed)
        return len(rows), sum(row.length for row in rows)

    @property
    def host_rows(self) -> int:
        return len(self._decode[Tier.HOST])

    def has_room(self, choice: Choice, tier: Tier) -> bool:
        """For a chunk of it, and for all its known tokens in staging if it needs any there."""
        staged = self._is_staged(tier)
        return self.chunks > 0 and (not staged or self._blocks(choice.length) <= self._staging)

    def add(self, choice: Choice, *, streams: bool = False, starts: bool = False) -> None:
        """The next tokens of a running choice: one if it is decoding, else as long a chunk as the
        budget allows. `streams`: it decodes on the device, over its KV on the host. `starts`: it
        is new here, and the host waits for no row of it."""
        assert self.budget > 0
        assert choice.tier is not None
        choice.last_planned = self._iteration
        if choice.is_decoding and not (starts and self._is_staged(choice.tier)):
            row = DecodeRow(
                key=choice.key,
                token_id=choice.last_token_id(),
                length=choice.length,
                blocks=choice.table.view(),
            )
            (self._streamed if streams else self._decode[choice.tier]).append(row)
            self.budget -= 1
            self._staging -= self._blocks(choice.length) if streams else 0
            return
        end = min(choice.length, choice.computed + self.budget)
        self._prefill.append(_chunk(choice, choice.tier, end))
        self.budget -= end - choice.computed
        self.chunks -= 1
        self._staging -= self._blocks(end) if self._is_staged(choice.tier) else 0

    def _is_staged(self, tier: Tier) -> bool:
        return tier is Tier.HOST and self._limits.staged_prompts

    def _blocks(self, tokens: int) -> int:
        return blocks_for(tokens, self._limits.block_tokens)

    def build(self) -> tuple[SubBatch, ...]:
        batch = SubBatch(
            prefill=tuple(self._prefill),
            gpu_decode=tuple(self._decode[Tier.GPU]),
            streamed=tuple(self._streamed),
            host_decode=tuple(self._decode[Tier.HOST]),
        )
        return (batch,) if batch.tokens else ()


def _chunk(choice: Choice, tier: Tier, end: int) -> PrefillRow:
    start, prompt = choice.computed, len(choice.request.prompt)
    targets: tuple[int, ...] = ()
    # The choices of a request share its prompt; the first one tells its log probabilities.
    if choice.request.wants_prompt_logprobs and choice.index == 0:
        targets = choice.token_ids(start + 1, max(start + 1, min(end + 1, prompt)))
    return PrefillRow(
        key=choice.key,
        tier=tier,
        start=start,
        token_ids=choice.token_ids(start, end),
        blocks=choice.table.view(),
        samples=end == choice.length,
        logprob_targets=targets,
    )


def _ready(state: SchedulerState) -> list[Choice]:
    """Choices that hold blocks and may have rows in this iteration."""
    return [
        choice
        for choice in state.running
        if choice.tier
        and state.usable(choice.tier)
        and not choice.is_ending
        and choice.flight is None
        and choice.key not in state.leaving
    ]


def add_decoding(state: SchedulerState, batch: BatchBuilder) -> None:
    """Decode rows of the choices that already hold blocks."""
    ready = _ready(state)
    decoding = [choice for choice in ready if choice.is_decoding]
    host = [choice for choice in decoding if choice.tier is Tier.HOST]
    limits, decision = state.limits, state.decision
    room = limits.streamed_blocks - _prompts_share(state, ready)
    if decision is not None:
        room = min(room, _streamed_room(decision.streamed_tokens, host, limits.block_tokens))
    streams = streamed(host, room, limits.block_tokens, state.host_sweep_ms)
    if decision is not None or limits.cohorts:
        going = streams | _host_rows(state, host, streams)
        decoding = [c for c in decoding if c.tier is Tier.GPU or c in going]
    for choice in _fair(decoding, batch.budget):
        batch.add(choice, streams=choice in streams)


def add_chunks(state: SchedulerState, batch: BatchBuilder) -> None:
    """Of prompts that are under way, behind the decode rows."""
    for choice in _ready(state):
        if batch.budget == 0:
            return
        if not choice.is_decoding and choice.tier and batch.has_room(choice, choice.tier):
            batch.add(choice)


def _streamed_room(tokens: float, host: Sequence[Choice], block_tokens: int) -> int:
    """Blocks for what was decided, an average of many: at least the shortest choice's, or the last
    few of them might neither stream nor be worth a promotion, and wait for ever."""
    if not tokens or not host:
        return 0
    shortest = min(choice.length for choice in host)
    return blocks_for(max(round(tokens), shortest), block_tokens)


def _prompts_share(state: SchedulerState, ready: Sequence[Choice]) -> int:
    """Blocks of staging that prompts come to before streamed rows: those under way, and the one
    that would be next if the host tier wants it."""
    limits = state.limits
    if not limits.staged_prompts:
        return 0
    prompts = [c for c in ready if c.tier is Tier.HOST and not c.is_decoding]
    wants = state.host_wants()
    going = (c for c in state.ahead() if Tier.HOST in state.start_tiers(c))
    waiting = next((choice for choice in going if state.host_takes(choice, wants)), None)
    if waiting is not None:
        needed = blocks_for(waiting.length, limits.block_tokens)
        prompts += [waiting] if state.fits(Tier.HOST, needed) else []
    share = 0
    for choice in prompts:
        needed = blocks_for(choice.length, limits.block_tokens)
        share += needed if share + needed <= limits.streamed_blocks else 0
    return share


def _host_rows(state: SchedulerState, ready: Sequence[Choice], streams: set[Choice]) -> set[Choice]:
    """Who of the host's choices is a host row of this sweep."""
    decision = state.decision
    if decision is None or decision.way == DEFERRED:
        return cohort(state, ready, streams)
    if decision.way == GPU_ONLY or state.flights:
        return set()  # they go back to the GPU tier; or what is under way has to land first
    return _longest_waiting(ready, streams, decision.host_tokens)


def cohort(state: SchedulerState, ready: Sequence[Choice], streams: set[Choice]) -> set[Choice]:
    """Who of the host's choices starts its next token in this sweep: up to one cohort's share of
    the KV there, so that the host has as much to read in one layer as in another. `streams`: those
    whose KV the host does not read."""
    theirs = [c for c in state.running if c.tier is Tier.HOST and c not in streams]
    share = sum(choice.length for choice in theirs) / state.limits.cohorts
    if state.decision is not None:
        share = min(share, state.decision.host_tokens)
    return _longest_waiting(ready, streams, share, state.limits.cohort_rows)


def _longest_waiting(
    ready: Sequence[Choice], streams: set[Choice], tokens: float, rows: int = 0
) -> set[Choice]:
    """Those not in `streams` that have waited longest for their turn: as many as come nearest to
    `tokens` of KV, at least one, at most `rows` unless that is 0."""
    waiting = sorted(
        (choice for choice in ready if choice not in streams),
        key=lambda choice: choice.last_planned,
    )
    going: set[Choice] = set()
    for choice in waiting[: rows or None]:
        if going and choice.length / 2 > tokens:
            break
        going.add(choice)
        tokens -= choice.length
    return going


def _fair(choices: Sequence[Choice], budget: int) -> Sequence[Choice]:
    """All of them, or the `budget` ones that have waited longest for their turn."""
    if len(choices) <= budget:
        return choices
    return sorted(choices, key=lambda choice: choice.last_planned)[:budget]
