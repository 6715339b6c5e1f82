"""What one tenant has computed shows nowhere in what another one gets: neither in tokens, whose KV
would be NaN if it came from a block that another request has left, nor in usage, nor in how much
is computed."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache
from typing import Any

import msgspec
import pytest

from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Abort, RequestUsage, Submit
from gpu_service.kv import keys
from gpu_service.model.model import CausalLM, load_model
from gpu_service.scheduling import state as scheduling_state
from gpu_service.scheduling.plan import IterationPlan, Tier
from tests.golden.test_engine import HOW
from tests.support import mixed_sampling as mixed
from tests.support.engine import (
    Answers,
    alone,
    config,
    greedy,
    host_of,
    local_core,
    prompt,
    run,
    step,
)
from tests.support.models import tiny_model_dir
from tests.support.poison import Poison

OUTPUT = 12
TENANTS = ("a\0", "b\0")
WAYS = [
    "never", "always-chunked", "small-gpu-pool", "forced-1", "small-gpu-pool-deferred",
    "forced-1-deferred", "small-gpu-pool-asymmetric",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    directory = tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", head_dim=16)
    return load_model(directory, dtype="float32")


def made_core(model: CausalLM, how: str) -> EngineCore:
    made = config("tiny", cpu_services=("local",), **{"prefix_caching": True, **HOW[how]})
    return local_core(made, model, host_blocks=0 if made.offload == "never" else 40)


def shared_by_both(round_: int) -> list[Submit]:
    """Both tenants ask the same, at the same time, for what each has asked before."""
    return [
        msgspec.structs.replace(greedy(f"{tenant[0]}{n}-{round_}", prompt(30 + 5 * n, n), OUTPUT),
                                cache_salt=tenant)
        for n, tenant in itertools.product(range(2), TENANTS)
    ]  # fmt: skip


@cache
def expected(model: CausalLM, number: int) -> list[int]:
    return alone(model, shared_by_both(0)[number])


@pytest.mark.parametrize("how", WAYS)
def test_nobody_reads_what_another_one_left(model: CausalLM, how: str) -> None:
    core = made_core(model, how)
    poison = Poison(core)
    for round_ in range(2):
        answers = Answers()
        asked = shared_by_both(round_)
        # Its blocks are let go in the middle and go to the others.
        for request in (*asked, greedy("gone", prompt(40, 9), 40)):
            core.handle(request)
        while ("gone", 0) not in answers.tokens:
            step(core, answers)
        core.handle(Abort("gone"))
        while core.scheduler.live_requests or core.scheduler.state.flights:
            step(core, answers)
        core.scheduler.state.check_integrity()
        assert answers.refusals == {}
        for number, request in enumerate(asked):
            assert answers.tokens[request.request_id, 0] == expected(model, number)
    used = [Tier.GPU, Tier.HOST] if how.startswith(("small", "forced")) else []
    assert all(poison.blocks[tier] > 0 for tier in used)


def test_preemption_leaves_nothing_to_read(model: CausalLM) -> None:
    core = made_core(model, "never")
    poison = Poison(core)
    asked = shared_by_both(0)
    done = mixed.run_mixed(core, asked, preempt_every=3)
    assert done.preempted > 2
    assert poison.blocks[Tier.GPU] > 0
    for number, request in enumerate(asked):
        assert done.answers.tokens[request.request_id, 0] == expected(model, number)


def visits(core: EngineCore, *salts: str) -> tuple[RequestUsage, Counter[str]]:
    """The same prompt, one salt after the other; the last one's usage, and what it took."""
    for salt in salts:
        computed: Counter[str] = Counter()

        def count(plan: IterationPlan, *rest: Any, into: Counter[str] = computed) -> None:
            chunks = (len(row.token_ids) for batch in plan.batches for row in batch.prefill)
            into.update({"prompt tokens": sum(chunks), "sweeps": 1})

        core.observe = count
        asked = msgspec.structs.replace(greedy("asked", prompt(50), 4), cache_salt=salt)
        usage = run(core, [asked]).usages["asked"]
    return usage, computed


@pytest.mark.parametrize("how", ["never", "always-chunked", "always-deferred"])
def test_another_tenants_prompt_costs_what_a_new_one_does(model: CausalLM, how: str) -> None:
    """Neither usage nor the work, which is what time depends on, tells that somebody asked this."""
    one, other = TENANTS
    own, less = visits(made_core(model, how), one, one)
    theirs, all_of_it = visits(made_core(model, how), one, other)
    _, new = visits(made_core(model, how), other)
    assert own.cached_prompt_tokens == 48
    assert (theirs.cached_prompt_tokens, theirs.cached_host_tokens) == (0, 0)
    assert less["prompt tokens"] < 5 < all_of_it["prompt tokens"]
    assert all_of_it == new


def test_a_salt_that_is_not_heeded_shows(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scheduling_state, "root_key", lambda secret, salt: keys.root_key(secret, "")
    )
    theirs, _ = visits(made_core(model, "never"), *TENANTS)
    assert theirs.cached_prompt_tokens == 48


@pytest.mark.parametrize("place", ["gpu", "host"])
def test_a_block_that_is_not_written_shows(model: CausalLM, place: str) -> None:
    core = made_core(model, "never" if place == "gpu" else "always-chunked")
    Poison(core)
    store = core._runner._parts.gpu if place == "gpu" else host_of(core)  # type: ignore[attr-defined]
    name = "write" if place == "gpu" else "write_kv"
    write = getattr(store, name)

    def forgets_one(layer: int, slots: Any, k: Any, v: Any) -> None:
        kept = slice(1, None) if layer == 1 and not k.isnan().any() else slice(None)
        write(layer, slots[kept], k[kept], v[kept])

    setattr(store, name, forgets_one)
    asked = shared_by_both(0)
    answers = run(core, asked)
    said = [answers.tokens.get((request.request_id, 0)) for request in asked]
    assert said != [expected(model, number) for number in range(len(asked))]
