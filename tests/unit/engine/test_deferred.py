"""Deferred attention around a tiny model: whatever happens to rows that are under way, tokens are
those of the GPU tier alone, and no block is given away too early."""

from __future__ import annotations

import random

import pytest
import torch

from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Abort
from gpu_service.model.model import CausalLM, load_model
from gpu_service.offload.host_tier import HostTierState
from gpu_service.scheduling.plan import Mode, Tier
from tests.support.engine import (
    Answers,
    alone,
    check_empty,
    config,
    greedy,
    host_of,
    local_core,
    prompt,
    run,
    step,
)
from tests.support.models import tiny_model_dir


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    directory = tiny_model_dir(tmp_path_factory.mktemp("model") / "llama", "llama", head_dim=16)
    return load_model(directory, dtype="float32")


def deferred_core(model: CausalLM, host_blocks: int = 64, **changes: object) -> EngineCore:
    values = {"offload": "auto", "offload_mode": "deferred", **changes}
    return local_core(
        config("tiny", cpu_services=("local",), **values), model, host_blocks=host_blocks
    )


def drain(core: EngineCore, answers: Answers) -> None:
    while core.scheduler.live_requests or core.scheduler.state.flights:
        step(core, answers)
    check_empty(core)


def test_a_token_takes_a_sweep_for_each_layer_and_one(model: CausalLM) -> None:
    core = deferred_core(model, offload="always")
    core.handle(greedy("a", prompt(20), 4))
    modes: list[Mode] = []
    core.observe = lambda plan, result, seconds: modes.append(plan.mode)
    answers = Answers()
    drain(core, answers)
    sweeps = model.spec.layers + 1
    assert modes == [Mode.INLINE] + [Mode.DEFERRED] * (3 * sweeps)


def test_the_gpu_s_rows_get_a_token_from_every_sweep_meanwhile(model: CausalLM) -> None:
    core = deferred_core(model)
    host = greedy("host", prompt(20), 5, placement="cpu_preferred")
    gpu = greedy("gpu", prompt(30), 30)
    answers = run(core, [host, gpu])
    for request in (host, gpu):
        assert answers.tokens[request.request_id, 0] == alone(model, request)
    assert core.scheduler.iterations <= 35


@pytest.mark.parametrize("stall_at", [0, 1, 2, 3, 5, 8, 13])
def test_a_stall_voids_what_is_under_way_and_nothing_else(model: CausalLM, stall_at: int) -> None:
    hosts = [greedy(f"h{i}", prompt(17 + i), 9, placement="cpu_preferred") for i in range(4)]
    gpu = greedy("gpu", prompt(30), 40)
    core = deferred_core(model)
    answers = Answers()
    for request in (*hosts, gpu):
        core.handle(request)
    for _ in range(6):
        step(core, answers)
    assert core.scheduler.state.flights
    host_of(core).stall_at = stall_at
    while host_of(core).state is HostTierState.UP:
        step(core, answers)
    said = len(answers.tokens["gpu", 0])
    for _ in range(3):
        step(core, answers)
    assert not core.scheduler.state.flights
    assert len(answers.tokens["gpu", 0]) == said + 3, "others must go on"
    host_of(core).resume()
    drain(core, answers)
    for request in (*hosts, gpu):
        assert answers.tokens[request.request_id, 0] == alone(model, request)
        assert answers.usages[request.request_id].recomputations == 0


def test_kv_that_is_lost_under_way_is_computed_again(model: CausalLM) -> None:
    requests = [greedy(f"r{i}", prompt(30 + i), 8) for i in range(3)]
    core = deferred_core(model, offload="always")
    answers = Answers()
    for request in requests:
        core.handle(request)
    for _ in range(7):
        step(core, answers)
    host_of(core).lose()
    step(core, answers)
    host_of(core).resume()
    drain(core, answers)
    for request in requests:
        assert answers.tokens[request.request_id, 0] == alone(model, request)
        assert answers.usages[request.request_id].recomputations == 1


def test_blocks_of_an_aborted_row_are_free_only_when_it_has_landed(model: CausalLM) -> None:
    core = deferred_core(model, offload="always", host_blocks=8)
    answers = Answers()
    core.handle(greedy("old", prompt(90), 20))
    for _ in range(3):
        step(core, answers)
    pool = core.scheduler.state.pools[Tier.HOST]
    held = pool.used_count
    core.handle(Abort("old"))
    new = greedy("new", prompt(40, 5), 6)
    core.handle(new)
    step(core, answers)
    assert pool.used_count >= held
    drain(core, answers)
    assert ("old", 0) not in answers.finishes
    assert answers.tokens["new", 0] == alone(model, new)


@pytest.mark.parametrize("seed", range(4))
def test_aborts_at_any_moment_spoil_no_other_request(model: CausalLM, seed: int) -> None:
    """With a host pool that is short, so that blocks are used again at once."""
    draw = random.Random(seed)
    requests = [greedy(f"r{i}", prompt(draw.randint(5, 40), i), 10) for i in range(14)]
    core = deferred_core(model, offload="always", host_blocks=10)
    answers, waiting, aborted = Answers(), list(requests), set()
    while waiting or core.scheduler.live_requests:
        if waiting and draw.random() < 0.5:
            core.handle(waiting.pop(0))
        if draw.random() < 0.15:
            victim = draw.choice(requests).request_id
            aborted.add(victim)
            core.handle(Abort(victim))
        step(core, answers)
        core.scheduler.state.check_integrity()
    drain(core, answers)
    kept = [request for request in requests if request.request_id not in aborted]
    assert kept
    for request in kept:
        assert answers.tokens[request.request_id, 0] == alone(model, request)


def test_running_out_of_memory_repeats_what_was_under_way(model: CausalLM) -> None:
    core = deferred_core(model)
    answers = Answers()
    old = greedy("old", prompt(10), 12, placement="cpu_preferred")
    core.handle(old)
    for _ in range(3):
        step(core, answers)
    gpu = core._runner._parts.gpu  # type: ignore[attr-defined]
    original = gpu.write

    def failing(layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if len(slots) == 33 and layer == 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        original(layer, slots, k, v)

    gpu.write = failing
    core.handle(greedy("big", prompt(33), 4))
    drain(core, answers)
    assert {r: x.reason for r, x in answers.refusals.items()} == {"big": "OUT_OF_MEMORY"}
    assert answers.tokens["old", 0] == alone(model, old)


@pytest.mark.parametrize("mutant", ["late", "state", "positions"])
def test_rows_that_are_mixed_up_show_in_the_tokens(model: CausalLM, mutant: str) -> None:
    requests = [greedy(f"r{i}", prompt(11 + 3 * i, i), 6) for i in range(6)]
    core = deferred_core(model, offload="always")
    tier = host_of(core)
    wait = tier.wait

    def spoiled(lane: int, layer: int, out: torch.Tensor, back: int = 0) -> None:
        if mutant == "late" and layer == 1:
            out.zero_()  # the result of another sweep
            return
        wait(lane, layer, out, back)
        if mutant == "state" and len(out) > 1:
            out.copy_(out.flip(0))
        if mutant == "positions":
            tier._lanes[0].lengths[:] = tier._lanes[0].lengths.clip(2) - 1

    tier.wait = spoiled  # type: ignore[method-assign]
    answers = run(core, requests)
    said = [answers.tokens.get((r.request_id, 0)) for r in requests]
    assert said != [alone(model, r) for r in requests]
