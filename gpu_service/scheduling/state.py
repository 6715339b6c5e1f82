"""All that the scheduler knows, and the few verbs that change who holds which blocks.

Decisions (admission, residency, batching) read this and call the verbs; nothing else moves blocks,
so the invariants of `check_integrity` hold whatever is decided.
"""

from __future__ import annotations

import bisect
import itertools
import math
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from gpu_service.engine.messages import Submit
from gpu_service.kv.allocator import BlockAllocator
from gpu_service.kv.keys import SECRET_BYTES, BlockKeys, root_key
from gpu_service.kv.table import BlockTable, blocks_for
from gpu_service.scheduling.decision import Decision
from gpu_service.scheduling.limits import SchedulerLimits
from gpu_service.scheduling.plan import Flight, Migration, Tier
from gpu_service.scheduling.request import Choice, ChoiceState, PrefixTokens, Request
from gpu_service.scheduling.waiting import WaitingQueue
from gpu_service.scheduling.work import ASYMMETRIC, DEFERRED

if TYPE_CHECKING:
    from gpu_service.scheduling.reuse import Reuse


class SchedulerState:
    """Requests, queue, running choices and blocks. Used by one thread."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pools = {
            Tier.GPU: BlockAllocator(limits.gpu_blocks),
            Tier.HOST: BlockAllocator(limits.host_blocks),
        }
        self.requests: dict[str, Request] = {}
        self.waiting = WaitingQueue()
        self.running: list[Choice] = []
        """Sorted by `Choice.order`, oldest first."""
        self.running_by_key: dict[int, Choice] = {}
        self.host_up = limits.host_blocks > 0
        """False while the cpu_service is away: host choices wait, and no host block changes hands
        (a stopped peer may still write into blocks that it was told of)."""
        self.host_sweep_ms: float | None = None
        """Moving average of iterations with host decode rows; None until there was one."""
        self.flights: dict[Flight, list[int]] = {}
        """Deferred mode: rows under way, and the host blocks that wait for each: given up by their
        choice, but the host may still append to them."""
        self.flight_tokens: dict[Flight, int] = {}
        """What they attend to."""
        self.leaving: dict[int, tuple[Tier, list[int]]] = {}
        """Choices that move beside the sweep that is being decided, and the blocks that they leave:
        whose they are next is decided with the sweep after it, which waits for the copy."""
        self.decision: Decision | None = None
        """What was decided about modes; None where that is fixed."""
        self.launched = 0
        """Number of the last sweep whose results may still come."""
        self.recomputations = 0
        self.recomputed_tokens = 0
        """Whose KV was thrown away, and was not there any more when they started again."""
        self.migrations = dict.fromkeys(Tier, 0)
        self.given_back_tokens = dict.fromkeys(Tier, 0)
        """By choices that ended or left the tier, since the engine started."""
        self.prefix_tokens = PrefixTokens()
        self._secret = secrets.token_bytes(SECRET_BYTES)

    def forget_prefixes(self) -> None:
        """Nobody who comes from now on finds what those before have computed, or will."""
        self._secret = secrets.token_bytes(SECRET_BYTES)
        for pool in self.pools.values():
            pool.forget()

    # -- questions ---------------------------------------------------------------------------

    @property
    def defers(self) -> bool:
        """Host rows that start do so in deferred mode."""
        decision = self.decision
        return self.limits.cohorts > 0 if decision is None else decision.way == DEFERRED

    @property
    def splits(self) -> bool:
        """Host rows may be split over two sub-batches."""
        decision = self.decision
        return self.limits.asymmetric if decision is None else decision.way == ASYMMETRIC

    def usable(self, tier: Tier) -> bool:
        return self.pools[tier].total > 0 and (tier is Tier.GPU or self.host_up)

    def fits(self, tier: Tier, blocks: int) -> bool:
        return self.usable(tier) and self.pools[tier].can_allocate(blocks)

    def tiers_for(self, submit: Submit) -> tuple[Tier, ...]:
        """Where a new request may ever be, the preferred tier first. Not whether there is room
        now."""
        placement, policy = submit.placement, self.limits.offload
        if self.limits.host_blocks == 0 or policy == "never" or placement == "gpu_only":
            return (Tier.GPU,)
        if submit.tpot_ms is not None and not self._host_meets(submit.tpot_ms):
            return (Tier.GPU,)
        if policy == "always":
            return (Tier.HOST,)
        if placement == "cpu_preferred":
            return (Tier.HOST, Tier.GPU)
        return (Tier.GPU, Tier.HOST)

    def start_tiers(self, choice: Choice) -> tuple[Tier, ...]:
        """Where its prompt may be computed, the preferred tier first."""
        return choice.request.tiers if self.prefills_on_host(choice) else (Tier.GPU,)

    def prefills_on_host(self, choice: Choice) -> bool:
        """Its tokens may be computed for the host tier, now or again later."""
        limits = self.limits
        if not limits.staged_prompts:
            return limits.host_prefill
        needed = blocks_for(choice.final_length - 1, limits.block_tokens)
        return limits.host_prefill and needed <= limits.streamed_blocks

    def ahead(self, count: int = 64) -> list[Choice]:
        """The next choices of the queue, which stand for all of it."""
        return list(itertools.islice(self.waiting, count))

    def never_on_gpu(self, choice: Choice) -> bool:
        """The host tier is the only one that it may be on, or that is large enough."""
        needed = blocks_for(choice.final_length - 1, self.limits.block_tokens)
        return Tier.GPU not in choice.request.tiers or needed > self.pools[Tier.GPU].total

    def host_wants(self) -> float:
        """Tokens of KV that the host tier lacks for what was decided."""
        if self.decision is None:
            return math.inf
        held = sum(choice.length for choice in self.running if choice.tier is Tier.HOST)
        return self.decision.resident_tokens - held

    def host_takes(self, choice: Choice, wants: float | None = None) -> bool:
        """The host tier gains by having it, too, or is the only one that can. `wants`: of
        `host_wants`, where it is known."""
        lacks = self.host_wants() if wants is None else wants
        return choice.length <= lacks or self.never_on_gpu(choice)

    def _host_meets(self, tpot_ms: float) -> bool:
        """Unknown counts as no: a promise that nobody has measured is not made."""
        return self.host_sweep_ms is not None and self.host_sweep_ms <= tpot_ms

    def running_on(self, tier: Tier) -> list[Choice]:
        """Oldest first; a new list, so that the caller may move choices while it walks."""
        return [choice for choice in self.running if choice.tier is tier]

    def shareable_blocks(self, choice: Choice, tier: Tier) -> list[int]:
        """Full blocks of the prompt that another choice of the same request holds on `tier`,
        computed.

        At least one token is left to compute, since its logits are needed."""
        request = choice.request
        if len(request.choices) == 1:
            return []
        prompt = len(request.prompt)
        full = min(prompt, choice.length - 1) // self.limits.block_tokens
        for other in request.choices:
            if other.tier is tier and other.computed >= prompt and full:
                return other.table.tolist()[:full]
        return []

    def growth(self, tier: Tier, horizon_tokens: int) -> int:
        """Blocks that the choices on `tier` will ask for in their next `horizon_tokens` tokens."""
        return sum(self.growth_of(c, horizon_tokens) for c in self.running if c.tier is tier)

    def growth_of(self, choice: Choice, horizon_tokens: int) -> int:
        """Blocks that a running choice will ask for in its next `horizon_tokens` tokens."""
        needed = blocks_for(choice.length_after(horizon_tokens), self.limits.block_tokens)
        return max(0, needed - len(choice.table))

    def new_keys(self, submit: Submit) -> BlockKeys | None:
        """For the contents of a request's blocks."""
        if not self.limits.prefix_caching:
            return None
        return BlockKeys(root_key(self._secret, submit.cache_salt), self.limits.block_tokens)

    # -- verbs -------------------------------------------------------------------------------

    def start(self, choice: Choice, tier: Tier, reuse: Reuse) -> Migration | None:
        """WAITING -> RUNNING with blocks for all its known tokens, those of `reuse` among them;
        returns what is to be copied before its first row runs."""
        assert choice.state is ChoiceState.WAITING
        pool, size = self.pools[tier], self.limits.block_tokens
        held, copied = len(reuse.held), len(reuse.copied)
        pool.fork(reuse.held)
        own = pool.allocate(blocks_for(choice.length, size) - held)
        self.waiting.remove(choice)
        choice.state, choice.tier = ChoiceState.RUNNING, tier
        choice.table = BlockTable([*reuse.held, *own])
        choice.computed = choice.confirmed = (held + copied) * size
        choice.published = held
        choice.lossy = tier is Tier.HOST and self.limits.host_lossy
        self.recomputed_tokens += max(0, choice.discarded - choice.computed)
        choice.discarded = 0
        bisect.insort(self.running, choice, key=lambda c: c.order)
        self.running_by_key[choice.key] = choice
        self._count_reuse(choice, tier, reuse)
        if not copied:
            return None
        choice.moved = self.launched + 1
        return Migration(
            key=choice.key,
            target=tier,
            tokens=copied * size,
            source_blocks=np.array(reuse.copied, np.int32),
            target_blocks=choice.table.view()[held : held + copied],
            reuse=True,
        )

    def _count_reuse(self, choice: Choice, tier: Tier, reuse: Reuse) -> None:
        if choice.forgotten:
            return  # it has been counted when it started for the first time
        size, request = self.limits.block_tokens, choice.request
        on_host = size * len(reuse.held if tier is Tier.HOST else reuse.copied)
        request.cached_prompt_tokens += choice.computed
        request.cached_host_tokens += on_host
        if request.first_planned is None:
            request.prefix_hit_tokens = choice.computed
        if reuse.looked_up:
            self.prefix_tokens.queried += len(request.prompt)
            self.prefix_tokens.found += choice.computed
            self.prefix_tokens.found_on_host += on_host

    def reserve(self, choice: Choice, tokens: int) -> bool:
        """Make room for `tokens` tokens in the choice's table; False (and no change) if there are
        too few blocks."""
        assert choice.tier is not None
        missing = blocks_for(tokens, self.limits.block_tokens) - len(choice.table)
        if missing <= 0:
            return True
        if not self.fits(choice.tier, missing):
            return False
        choice.table.extend(self.pools[choice.tier].allocate(missing))
        return True

    def migrate(self, choice: Choice, *, beside: bool = False) -> Migration:
        """Give a running choice blocks on the other tier, for all its known tokens, and let go of
        its own. `beside`: nobody needs either in this iteration, so that the copy may run beside
        its sweep where the device can do that, and if there is anything to copy.

        The caller has checked that they fit. Blocks that other choices share stay with them."""
        beside = beside and self.limits.copies_beside and choice.computed > 0
        source = choice.tier
        assert source is not None
        assert choice.flight is None
        target, size = source.other, self.limits.block_tokens
        table = BlockTable(self.pools[target].allocate(blocks_for(choice.length, size)))
        filled = blocks_for(choice.computed, size)
        migration = Migration(
            key=choice.key,
            target=target,
            tokens=choice.computed,
            source_blocks=choice.table.view()[:filled],
            target_blocks=table.view()[:filled],
            beside=beside,
        )
        self.given_back_tokens[source] += choice.length
        if beside:
            self.leaving[choice.key] = source, choice.table.tolist()
        else:
            self.pools[source].free(choice.table.tolist())
        choice.tier, choice.table = target, table
        choice.published, choice.moved = 0, self.launched + 1
        choice.lossy = choice.lossy or (target is Tier.HOST and self.limits.host_lossy)
        choice.request.migrations[target] += 1
        self.migrations[target] += 1
        return migration

    def left(self) -> None:
        """The plan beside which choices move is decided, and on its way unless it was empty: the
        next one finds their blocks free."""
        for tier, blocks in self.leaving.values():
            self.pools[tier].free(blocks)
        self.leaving.clear()

    def preempt(self, choice: Choice) -> None:
        """RUNNING -> WAITING: its KV is thrown away and will be computed again."""
        self._release(choice)
        if choice.computed:
            choice.request.recomputations += 1
            self.recomputations += 1
            choice.discarded = choice.computed
        choice.computed = choice.confirmed = choice.published = choice.pending = 0
        choice.forgotten = self.launched
        choice.state = ChoiceState.WAITING
        self.waiting.push(choice)

    def finish(self, choice: Choice) -> None:
        """To FINISHED from any state; the last choice takes its request with it."""
        if choice.state is ChoiceState.RUNNING:
            self._release(choice)
        elif choice.state is ChoiceState.WAITING:
            self.waiting.remove(choice)
        choice.state = ChoiceState.FINISHED
        request = choice.request
        if request.is_finished:
            del self.requests[request.request_id]
            # They refer to it, too: the collector alone would find such a ring, tens of minutes
            # and a hundred MiB later.
            request.choices.clear()
        else:
            # The others may have waited for this one's prefill.
            self.release_held(request)

    def release_held(self, request: Request) -> None:
        """HELD -> WAITING, once another choice has computed the prompt; without such a choice one
        of them goes first."""
        live = [c for c in request.choices if c.state is not ChoiceState.FINISHED]
        held = [c for c in live if c.state is ChoiceState.HELD]
        if not held:
            return
        if len(held) == len(live):
            del held[1:]
        elif all(c.computed < len(request.prompt) for c in live):
            return
        for choice in held:
            choice.state = ChoiceState.WAITING
            self.waiting.push(choice)

    def _release(self, choice: Choice) -> None:
        assert choice.state is ChoiceState.RUNNING
        assert choice.tier is not None
        self.given_back_tokens[choice.tier] += choice.length
        if choice.flight is None:
            self.pools[choice.tier].free(choice.table.tolist())
        else:
            self.flights[choice.flight] = choice.table.tolist()
            choice.flight = None
        choice.tier, choice.table = None, BlockTable()
        choice.lossy = False
        del self.running_by_key[choice.key]
        place = bisect.bisect_left(self.running, choice.order, key=lambda c: c.order)
        assert self.running[place] is choice
        del self.running[place]

    def take_off(self, choice: Choice, number: int) -> None:
        """The choice's newest token is under way, started by that plan."""
        assert choice.tier is Tier.HOST
        assert choice.flight is None
        choice.flight = Flight(choice.key, number)
        self.flights[choice.flight] = []
        self.flight_tokens[choice.flight] = choice.length

    def land(self, flight: Flight) -> Choice | None:
        """The row is under way no more; returns its choice, if that still waits for it."""
        self.pools[Tier.HOST].free(self.flights.pop(flight))
        del self.flight_tokens[flight]
        choice = self.running_by_key.get(flight.key)
        if choice is None or choice.flight != flight:
            return None
        choice.flight = None
        return choice

    # -- integrity ---------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that nothing leaked and that nobody is in two places. O(all blocks): for tests and
        idle times."""
        for tier, pool in self.pools.items():
            held = list(self.flights.values()) if tier is Tier.HOST else []
            held += [blocks for left, blocks in self.leaving.values() if left is tier]
            tables = (c.table.tolist() for c in self.running if c.tier is tier)
            pool.check_integrity(itertools.chain(tables, held))
        assert {c.flight for c in self.running if c.flight} <= self.flights.keys()
        choices = [c for r in self.requests.values() for c in r.choices]
        self._check_members(choices, ChoiceState.RUNNING, self.running)
        self._check_members(choices, ChoiceState.WAITING, self.waiting)
        size = self.limits.block_tokens
        for choice in self.running:
            assert self.running_by_key[choice.key] is choice
            assert 0 <= choice.computed < choice.length
            assert choice.pending >= 0
            assert 0 <= choice.confirmed <= choice.computed
            assert len(choice.table) >= blocks_for(choice.computed, size)
            # Only complete blocks may be shared: nobody ever writes into those again.
            assert choice.tier is not None
            pool = self.pools[choice.tier]
            private = choice.table.tolist()[choice.computed // size :]
            assert all(pool.references(block) == 1 for block in private)

    @staticmethod
    def _check_members(
        choices: list[Choice], state: ChoiceState, members: Iterable[Choice]
    ) -> None:
        expected = {c.key for c in choices if c.state is state}
        present = [c.key for c in members]
        assert sorted(present) == sorted(expected), f"{state.value} choices in the wrong place"
        orders = [c.order for c in members]
        assert orders == sorted(orders)
