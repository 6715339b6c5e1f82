"""KV that is found by its contents, on a machine that knows what every slot holds: whatever fails,
moves, ends or is decided ahead, nobody reads another sequence's."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from gpu_service.engine.messages import Submit
from gpu_service.kv import keys
from gpu_service.kv.allocator import BlockAllocator
from gpu_service.offload.host_tier import HostTierState
from gpu_service.scheduling import reuse, scheduler, state
from gpu_service.scheduling.plan import IterationPlan, Mode, SweepResult, Tier
from gpu_service.scheduling.request import Choice
from gpu_service.scheduling.scheduler import Scheduler
from tests.support.fake_model import Machine, expected_output, limits, submit
from tests.support.mutants import mutated


def related(seed: int, count: int) -> list[Submit]:
    """Prompts that grow out of few beginnings, as conversations and shared instructions do."""
    draw = random.Random(seed)
    trunks = [[draw.randrange(1, 900) for _ in range(60)] for _ in range(3)]
    made = []
    for number in range(count):
        trunk, shared = draw.choice(trunks), draw.randint(0, 40)
        own = [draw.randrange(1, 900) for _ in range(draw.randint(1, 10))]
        one = submit(
            f"r{number}",
            1,
            draw.randint(1, 20),
            n=draw.choice((1, 1, 2)),
            placement=draw.choice(("auto", "auto", "gpu_only", "cpu_preferred")),
        )
        salt = draw.choice(("", "", "other"))
        made.append(
            msgspec.structs.replace(one, prompt_token_ids=trunk[:shared] + own, cache_salt=salt)
        )
    return made


STATES = (HostTierState.UP, HostTierState.DEGRADED, HostTierState.LOST)


class Unreliable:
    """Loses migrations and voids host rows: what they were to store is not there."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self._machine = machine
        self._draw = random.Random(seed)

    def __call__(self, plan: IterationPlan, result: SweepResult) -> SweepResult:
        draw, stored = self._draw, self._machine._books.stored
        # A deferred row of theirs would go on reading what is not there, to no effect.
        flying = {r.key for b in plan.batches for r in b.host_decode if plan.mode is Mode.DEFERRED}
        moving = [m.key for m in plan.migrations if m.key not in flying]
        lost = frozenset(key for key in moving if draw.random() < 0.3)
        # Of two moves of one choice the first one's blocks are others' by now.
        for move in {m.key: m for m in plan.migrations}.values():
            for block in move.target_blocks if move.key in lost else ():
                stored.pop((move.target, int(block)), None)
        rows = (
            [] if plan.mode is Mode.DEFERRED else [r for b in plan.batches for r in b.host_decode]
        )
        if draw.random() < 0.8:
            rows = []
        size = self._machine.scheduler.limits.block_tokens
        for row in rows:
            last = row.length - 1
            stored.get((Tier.HOST, int(row.blocks[last // size])), {}).pop(last % size, None)
        gone = lost | {row.key for row in rows}
        return dataclasses.replace(
            result,
            tokens={key: token for key, token in result.tokens.items() if key not in gone},
            void=result.void | {row.key for row in rows},
            lost=lost,
        )


def drive(seed: int, *, trouble: bool, look_ahead: bool, **changes: object) -> Machine:
    draw = random.Random(seed)
    requests = related(seed, 30)
    machine = Machine(Scheduler(limits(prefix_caching=True, **changes)), look_ahead=look_ahead)
    waiting, aborted, spoil = list(requests), set[str](), Unreliable(machine, seed)
    for _ in range(5000):
        if not waiting and not machine.scheduler.live_requests:
            break
        if waiting and draw.random() < 0.5:
            machine.submit(waiting.pop(0))
        if trouble:
            machine.host = draw.choices(STATES, (0.88, 0.1, 0.02))[0]
            if machine.host is HostTierState.LOST:
                machine.lose_host()
            machine.stalls = draw.random() < 0.1
            if draw.random() < 0.1:
                victim = draw.choice(requests)
                machine.scheduler.abort(victim.request_id, None, machine.now)
                aborted.add(victim.request_id)
        machine.step(spoil if trouble else None)
    machine.check_empty()
    assert not machine.scheduler.live_requests
    for request in requests:
        for index in range(request.sampling.n):
            if request.request_id not in aborted:
                said = machine.outputs[request.request_id, index]
                assert said == expected_output(request)
    return machine


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("offload", ["never", "auto", "always"])
@pytest.mark.parametrize("cohorts", [0, 3])
@pytest.mark.parametrize("trouble", [False, True])
def test_nobody_reads_what_is_not_theirs(
    seed: int, offload: str, cohorts: int, trouble: bool
) -> None:
    machine = drive(
        seed,
        trouble=trouble,
        look_ahead=True,
        offload=offload,
        cohorts=cohorts,
        gpu_blocks=24,
        force_migration_every=(0, 3)[seed % 2],
    )
    found = machine.scheduler.state.prefix_tokens
    assert found.queried > found.found > found.queried // 20


@pytest.mark.parametrize("seed", range(4))
def test_prompts_on_the_gpu_alone(seed: int) -> None:
    """As CUDA sweeps have it; decisions run ahead of what is under way on the host."""
    machine = drive(
        seed,
        trouble=False,
        look_ahead=True,
        cohorts=4,
        cohort_rows=2,
        host_prefill=False,
        host_blocks=60,
        gpu_blocks=24,
        force_migration_every=3,
    )
    assert machine.looked_ahead > 0.8 * len(machine.plans) - 20
    assert machine.scheduler.state.prefix_tokens.found_on_host > 0


def everything() -> None:
    """A short run of all of it."""
    for seed in range(3):
        for offload, cohorts in (("never", 0), ("auto", 0), ("always", 3)):
            test_nobody_reads_what_is_not_theirs(seed, offload, cohorts, True)
        test_prompts_on_the_gpu_alone(seed)


MUTANTS = [
    ("plan_number < choice.moved", "plan_number < choice.moved - 1"),
    ("complete = choice.confirmed //", "complete = choice.computed //"),
    ("choice.block_keys((choice.length - 1) //", "choice.block_keys(choice.length //"),
    ("keys[len(held) :] if", "keys if"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_found(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(mutated(reuse, old, new, tmp_path), monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        everything()


def use(wrong: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler.reuse, "publish", wrong.publish)
    monkeypatch.setattr("gpu_service.scheduling.admission.reusable", wrong.reusable)


def test_a_lost_host_tier_that_is_not_forgotten_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockAllocator, "forget", lambda allocator: None)
    with pytest.raises((AssertionError, KeyError)):
        everything()


# -- tenants --------------------------------------------------------------------------------------


def strangers() -> Machine:
    """The same few prompts over and over, each from somebody else."""
    machine = Machine(Scheduler(limits(prefix_caching=True)))
    for number, request in enumerate(related(5, 30)):
        salt = f"tenant{number}"
        machine.submit(msgspec.structs.replace(request, cache_salt=salt))
    machine.run()
    return machine


def test_nobody_finds_what_has_another_salt() -> None:
    machine = strangers()
    usages = machine.usages.values()
    assert machine.scheduler.state.prefix_tokens.queried > 500
    assert not any(usage.prefix_hit_tokens for usage in usages)
    # A request's own choices share.
    assert any(usage.cached_prompt_tokens for usage in usages)


def test_a_salt_that_is_dropped_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "root_key", lambda secret, salt: keys.root_key(secret, ""))
    with pytest.raises(AssertionError):
        test_nobody_finds_what_has_another_salt()


# -- a host tier with fewer bits ------------------------------------------------------------------


class Rounding(Machine):
    """Its host tier rounds. Whoever has been on the GPU tier alone must not read what was there."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler, look_ahead=True)
        self.rounded: set[tuple[Tier, int]] = set()
        """Blocks that are, or that were computed from such ones."""
        self.visitors: set[int] = set()
        self.exact_hits = 0

    def _run(self, plan: IterationPlan) -> SweepResult:
        for move in plan.migrations:
            sources = [(move.target.other, int(block)) for block in move.source_blocks]
            targets = [(move.target, int(block)) for block in move.target_blocks]
            if move.target is Tier.HOST:
                self.visitors.add(move.key)
                self.rounded.update(targets)
            else:
                self.rounded.difference_update(targets)
                pairs = zip(sources, targets, strict=True)
                self.rounded.update(new for old, new in pairs if old in self.rounded)
        return super()._run(plan)

    def _store(self, key: int, tier: Tier, blocks: Any, start: int, end: int, size: int) -> None:
        super()._store(key, tier, blocks, start, end, size)
        table = [(tier, int(block)) for block in blocks]
        read, written = table[: -(-start // size)], table[start // size : -(-end // size)]
        if tier is Tier.HOST:
            self.visitors.add(key)
            self.rounded.update(written)
        elif not self.rounded.isdisjoint(read):
            assert key in self.visitors, "what was rounded is read by whoever wants it exactly"
            self.rounded.update(written)
        else:
            self.rounded.difference_update(written[1 if start % size else 0 :])
            self.exact_hits += start and self._choice(key).confirmed == start

    def _choice(self, key: int) -> Choice:
        return self.scheduler.state.running_by_key[key]


def rounding(seed: int) -> None:
    machine = Rounding(
        Scheduler(
            limits(
                prefix_caching=True,
                host_lossy=True,
                gpu_blocks=24,
                force_migration_every=(0, 3)[seed % 2],
            )
        )
    )
    requests = related(seed, 40)
    for request in requests:
        machine.submit(request)
        machine.step()
    machine.run()
    assert machine.exact_hits > 0
    found = machine.scheduler.state.prefix_tokens
    assert found.found_on_host > 0, "whoever starts on the host tier shares what is there"


@pytest.mark.parametrize("seed", range(4))
def test_what_was_rounded_is_nobodys_exact_hit(seed: int) -> None:
    rounding(seed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tier is Tier.HOST or not limits.host_lossy", "True"),
        ("choice.lossy and choice.tier is Tier.GPU", "False"),
    ],
)
def test_rounded_hits_show(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(mutated(reuse, old, new, tmp_path), monkeypatch)
    with pytest.raises(AssertionError):
        all_rounding()


def all_rounding() -> None:
    for seed in range(4):
        rounding(seed)


# -- what it is good for --------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["never", "auto", "always"])
@pytest.mark.parametrize("cohorts", [0, 3])
def test_cached_blocks_are_room_for_others(offload: str, cohorts: int) -> None:
    """With it the same requests are served, none starves, and all are done no later."""
    for seed in range(3):
        finished = {}
        for caching in (False, True):
            machine = Machine(
                Scheduler(limits(prefix_caching=caching, offload=offload, cohorts=cohorts))
            )
            for request in related(seed, 30):
                machine.submit(request)
            machine.run()
            machine.check_empty()
            finished[caching] = machine.now
        assert finished[True] <= finished[False]


def ask(machine: Machine, name: str, prompt: list[int], output: int = 2) -> int:
    """How much of the prompt was found."""
    one = submit(name, 1, output)
    machine.submit(msgspec.structs.replace(one, prompt_token_ids=prompt))
    machine.run()
    return machine.usages[name].prefix_hit_tokens


def prompt_of(name: str, tokens: int) -> list[int]:
    return submit(name, tokens, 1).prompt_token_ids


@pytest.mark.parametrize("offload", ["never", "always"])
def test_each_turn_finds_the_one_before(offload: str) -> None:
    """All of its full blocks: only the last token of an answer is never computed."""
    machine = Machine(Scheduler(limits(prefix_caching=True, offload=offload, gpu_blocks=32)))
    said = prompt_of("a", 11)
    there = 0
    for turn in range(5):
        found = ask(machine, f"a{turn}", said, output=7)
        assert found == there // 4 * 4
        said += machine.outputs[f"a{turn}", 0]
        there = len(said) - 1
        said += prompt_of(f"turn{turn}", 3 + turn)
    assert found > 0.75 * len(said) - 7


def test_what_was_used_last_stays() -> None:
    """Of two prompts that do not both fit beside a third, the one asked for again is found."""
    machine = Machine(Scheduler(limits(prefix_caching=True, offload="never", gpu_blocks=14)))
    a, b, c = (prompt_of(name, 20) for name in "abc")
    assert ask(machine, "a1", a) == 0
    assert ask(machine, "b1", b) == 0
    assert ask(machine, "a2", a) == 16
    assert ask(machine, "c1", c) == 0
    assert ask(machine, "a3", a) == 16
    assert ask(machine, "b2", b) < 16


def test_the_end_goes_before_the_beginning() -> None:
    """Whoever needs a few blocks takes the last ones of the oldest prompt."""
    machine = Machine(Scheduler(limits(prefix_caching=True, offload="never", gpu_blocks=12)))
    a = prompt_of("a", 33)
    assert ask(machine, "a1", a) == 0
    assert ask(machine, "b1", prompt_of("b", 17)) == 0
    assert 0 < ask(machine, "a2", a) < 32


def test_copies_from_the_other_tier_are_spread_over_iterations() -> None:
    """No sweep waits for more of them than one prompt beyond what it may compute."""
    room = {"gpu_blocks": 400, "host_blocks": 400, "max_context_tokens": 256}
    machine = Machine(Scheduler(limits(prefix_caching=True, max_batch_tokens=64, **room)))
    prompts = [prompt_of(f"p{n}", 100) for n in range(6)]
    for place, placement in enumerate(("cpu_preferred", "gpu_only")):
        for n, prompt in enumerate(prompts):
            one = submit(f"{place}-{n}", 1, 2, placement=placement)
            machine.submit(msgspec.structs.replace(one, prompt_token_ids=prompt))
        machine.run()
    copies = [sum(m.tokens for m in plan.migrations) for plan in machine.plans]
    assert sum(copies) == 6 * 96
    assert max(copies) == 96
    assert all(machine.usages[f"1-{n}"].cached_host_tokens == 96 for n in range(6))
