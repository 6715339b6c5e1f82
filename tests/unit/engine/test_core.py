"""The engine core around a tiny model: stalls, losses, memory, sampling, choices, stress."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Abort, Shutdown, Submit
from gpu_service.model.model import CausalLM, load_model
from gpu_service.offload.host_tier import HostTierState
from kernels.cpu import DType
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
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "llama", "llama", head_dim=16)


@pytest.fixture(scope="module")
def model(directory: Path) -> CausalLM:
    return load_model(directory, dtype="float32")


def core_of(
    model: CausalLM, host_blocks: int = 64, host: dict[str, object] | None = None, **changes: object
) -> EngineCore:
    made = config("tiny", cpu_services=("local",), **{"offload": "auto", **changes})
    return local_core(made, model, host_blocks=host_blocks, **(host or {}))


# -- the host tier fails in the middle of a sweep ------------------------------------------------


@pytest.mark.parametrize("stall_at", [0, 1, 2, 3, 4, 7])
def test_a_stall_in_any_layer_voids_the_host_rows_of_that_sweep_alone(
    model: CausalLM, stall_at: int
) -> None:
    host, gpu = (
        greedy("host", prompt(20), 12, placement="cpu_preferred"),
        greedy("gpu", prompt(30), 12),
    )
    core = core_of(model)
    answers = Answers()
    for request in (host, gpu):
        core.handle(request)
    for _ in range(3):
        step(core, answers)
    host_of(core).stall_at = stall_at
    while host_of(core).state is HostTierState.UP:
        step(core, answers)
    said = {key: len(tokens) for key, tokens in answers.tokens.items()}
    for _ in range(4):
        step(core, answers)
    assert len(answers.tokens["host", 0]) == said["host", 0], "decoded without a host tier"
    assert len(answers.tokens["gpu", 0]) == said["gpu", 0] + 4, "others must go on"
    host_of(core).resume()
    while core.scheduler.live_requests:
        step(core, answers)
    check_empty(core)
    for request in (host, gpu):
        assert answers.tokens[request.request_id, 0] == alone(model, request)
    assert answers.usages["host"].recomputations == 0


def test_kv_lost_before_the_lease_is_computed_again(model: CausalLM) -> None:
    request = greedy("a", prompt(40), 16)
    core = core_of(model, offload="always")
    answers = Answers()
    core.handle(request)
    for _ in range(5):
        step(core, answers)
    host_of(core).lose()
    step(core, answers)
    host_of(core).resume()
    while core.scheduler.live_requests:
        step(core, answers)
    check_empty(core)
    assert answers.tokens["a", 0] == alone(model, request)
    assert answers.usages["a"].recomputations == 1


def test_a_migration_that_fails_half_way_is_repaired_by_computing_again(model: CausalLM) -> None:
    request = greedy("a", prompt(40), 16)
    core = core_of(model, host={"mapped": False}, force_migration_every=4)
    tier = host_of(core)
    written = 0
    original = tier.write_kv

    def failing(layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        nonlocal written
        written += 1
        if written == 2:
            tier.state = HostTierState.DEGRADED
        original(layer, slots, k, v)

    tier.write_kv = failing  # type: ignore[method-assign]
    answers = Answers()
    core.handle(request)
    while core.scheduler.live_requests:
        step(core, answers)
        if tier.state is HostTierState.DEGRADED:
            tier.resume()
    assert answers.tokens["a", 0] == alone(model, request)
    assert answers.usages["a"].recomputations == 1
    check_empty(core)


@pytest.mark.parametrize("mapped", [True, False])
def test_migration_by_blocks_and_by_layers(model: CausalLM, mapped: bool) -> None:
    requests = [greedy(f"r{i}", prompt(17 + i, i), 12) for i in range(4)]
    core = core_of(model, host={"mapped": mapped}, force_migration_every=1)
    answers = run(core, requests)
    for request in requests:
        assert answers.tokens[request.request_id, 0] == alone(model, request)
    assert sum(u.promotions for u in answers.usages.values()) >= 4


def test_int8_host_kv_migrates_by_converting(model: CausalLM) -> None:
    """Lossy, so only that it runs and stays near: the first tokens are sampled before any loss."""
    request = greedy("a", prompt(30), 8)
    core = core_of(model, host={"kv_dtype": DType.INT8}, force_migration_every=3)
    answers = run(core, [request])
    assert len(answers.tokens["a", 0]) == 8
    assert answers.tokens["a", 0][:2] == alone(model, request)[:2]


# -- memory and numbers --------------------------------------------------------------------------


def test_running_out_of_memory_ends_one_request(model: CausalLM) -> None:
    core = core_of(model, offload="never", host_blocks=0)
    answers = Answers()
    old = greedy("old", prompt(10), 12)
    core.handle(old)
    step(core, answers)
    gpu = core._runner._parts.gpu
    original = gpu.write

    def failing(layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if len(slots) == 33 and layer == 1:
            raise RuntimeError(
                "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
            )
        original(layer, slots, k, v)

    gpu.write = failing  # type: ignore[method-assign]
    core.handle(greedy("big", prompt(33), 4))
    while core.scheduler.live_requests:
        step(core, answers)
    check_empty(core)
    assert {r: x.reason for r, x in answers.refusals.items()} == {"big": "OUT_OF_MEMORY"}
    assert answers.tokens["old", 0] == alone(model, old)


def test_other_errors_are_not_swallowed(model: CausalLM) -> None:
    core = core_of(model, offload="never", host_blocks=0)
    core._runner._parts.gpu.write = lambda *_: (_ for _ in ()).throw(RuntimeError("a bug"))  # type: ignore[method-assign]
    core.handle(greedy("a", prompt(5), 4))
    with pytest.raises(RuntimeError, match="a bug"):
        core.step()


def test_not_a_number_ends_its_request_and_no_other(model: CausalLM) -> None:
    requests = [greedy(f"r{i}", prompt(12, i), 8) for i in range(3)]
    expected = {r.request_id: alone(model, r) for r in requests}
    core = core_of(model, offload="never", host_blocks=0)
    original, calls = model.logits, 0

    def poisoned(state: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = original(state, rows)
        if calls == 3:
            logits[1] = float("nan")
        return logits

    core._runner._parts.model.logits = poisoned  # type: ignore[method-assign]
    try:
        answers = run(core, requests)
    finally:
        del model.logits
    assert {r: x.reason for r, x in answers.refusals.items()} == {"r1": "NUMERICAL"}
    for name in ("r0", "r2"):
        assert answers.tokens[name, 0] == expected[name]


# -- sampling, choices, log probabilities --------------------------------------------------------


def sampled(request_id: str, seed: int, **sampling: object) -> Submit:
    return greedy(request_id, prompt(19), 10, temperature=0.9, seed=seed, **sampling)


def test_a_seeded_draw_does_not_depend_on_company_tier_or_migration(model: CausalLM) -> None:
    expected = {seed: alone(model, sampled("x", seed)) for seed in range(6)}
    assert len({tuple(tokens) for tokens in expected.values()}) > 1
    for changes in ({"force_migration_every": 2}, {"offload": "always"}, {"max_batch_tokens": 5}):
        core = core_of(model, **changes)
        answers = run(core, [sampled(f"s{seed}", seed) for seed in range(6)])
        for seed, tokens in expected.items():
            assert answers.tokens[f"s{seed}", 0] == tokens


@pytest.mark.parametrize("offload", ["never", "always"])
def test_choices_share_the_prompt_and_draw_with_their_own_seeds(
    model: CausalLM, offload: str
) -> None:
    core = core_of(model, offload=offload)
    answers = run(core, [sampled("a", 40, n=4)])
    for index in range(4):
        assert answers.tokens["a", index] == alone(model, sampled("x", 40 + index))
    assert answers.usages["a"].cached_prompt_tokens == 3 * 16


def test_log_probabilities(model: CausalLM) -> None:
    request = greedy("a", prompt(37), 5, logprobs=2, prompt_logprobs=1)
    whole = run(core_of(model), [request])
    chunked = run(core_of(model, max_batch_tokens=6), [request])
    for answers in (whole, chunked):
        listed = answers.prompts["a"].logprobs
        assert [entry.token_id for entry in listed] == request.prompt_token_ids[1:]
        assert all(len(entry.top) == 1 for entry in listed)
        assert [e.token_id for e in answers.logprobs["a", 0]] == answers.tokens["a", 0]
        assert all(entry.rank == 1 for entry in answers.logprobs["a", 0])
    for a, b in zip(whole.prompts["a"].logprobs, chunked.prompts["a"].logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


# -- commands ------------------------------------------------------------------------------------


def test_shutdown_finishes_live_requests_first(model: CausalLM) -> None:
    core = core_of(model)
    core.handle(greedy("a", prompt(4), 3))
    core.handle(Shutdown())
    answers = Answers()
    while not core.is_done:
        step(core, answers)
    assert len(answers.tokens["a", 0]) == 3


def test_nothing_to_say_is_said_once(model: CausalLM) -> None:
    core = core_of(model)
    assert core.step() is not None, "the first load"
    assert core.step() is None
    assert not core.made_progress


def test_a_second_submission_of_a_live_id_is_ignored(model: CausalLM) -> None:
    core = core_of(model)
    request = greedy("a", prompt(6), 5)
    core.handle(request)
    core.handle(greedy("a", prompt(9), 50))
    answers = Answers()
    while core.scheduler.live_requests:
        step(core, answers)
    assert answers.tokens["a", 0] == alone(model, request)


def test_load_counts_tokens_by_tier(model: CausalLM) -> None:
    core = core_of(model)
    core.handle(greedy("g", prompt(6), 5))
    core.handle(greedy("h", prompt(6), 7, placement="cpu_preferred"))
    last = None
    while core.scheduler.live_requests:
        output = core.step()
        last = output.load if output else last
    assert last is not None
    assert (last.gpu.tokens_total, last.host.tokens_total) == (5, 7)
    assert last.gpu.free_blocks == last.gpu.total_blocks
    assert last.iteration_seconds > 0


# -- all of it together --------------------------------------------------------------------------


def stress_requests() -> Iterator[Submit]:
    draw = random.Random(1)
    for i in range(64):
        yield greedy(
            f"r{i}",
            prompt(draw.choice((1, 5, 16, 33, 60, 90)), i),
            draw.randint(1, 20),
            placement=draw.choice(("auto", "auto", "gpu_only", "cpu_preferred")),
        )


def test_64_mixed_requests_on_both_tiers_some_aborted(model: CausalLM) -> None:
    """No leaked block, and every token as if the request had run alone."""
    requests = list(stress_requests())
    draw = random.Random(2)
    core = core_of(model, 60, gpu_kv_blocks=40, max_batch_tokens=96, max_running_requests=40)
    answers, waiting, aborted = Answers(), list(requests), set[str]()
    while waiting or core.scheduler.live_requests:
        for _ in range(min(len(waiting), draw.randint(0, 8))):
            core.handle(waiting.pop(0))
        step(core, answers)
        if draw.random() < 0.3:
            victim = draw.choice(requests).request_id
            if any(r.request_id == victim for r in waiting):
                continue
            aborted.add(victim)
            core.handle(Abort(victim))
    check_empty(core)
    assert sum(u.host_tokens for u in answers.usages.values()) > 50
    assert sum(u.gpu_tokens for u in answers.usages.values()) > 50
    assert len(aborted) > 5
    finished = [r for r in requests if (r.request_id, 0) in answers.finishes]
    assert len(finished) > 30
    for request in finished:
        assert answers.tokens[request.request_id, 0] == alone(model, request)
