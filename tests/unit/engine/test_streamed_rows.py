"""Streamed rows around a tiny model: stalls, int8 pools, the memory that staging takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.engine.build import open_cpu_kv
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Submit
from gpu_service.model.model import CausalLM, load_model
from gpu_service.offload.host_tier import HostTierState
from gpu_service.pipeline import device_rows, streamed
from gpu_service.pipeline.device_kv import AttentionGeometry, staging_cost
from gpu_service.scheduling.plan import IterationPlan, SweepResult
from kernels.cpu import DType, ThreadPool
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
from tests.support.mutants import mutated


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    directory = tiny_model_dir(tmp_path_factory.mktemp("model") / "llama", "llama", head_dim=16)
    return load_model(directory, dtype="float32")


def core_of(model: CausalLM, streamed_kv_blocks: int = 16, **host: Any) -> EngineCore:
    made = config(
        "tiny",
        cpu_services=("local",),
        offload="auto",
        streamed_kv_blocks=streamed_kv_blocks,
    )
    return local_core(made, model, host_blocks=64, **host)


def hosts(tokens: int = 8) -> list[Submit]:
    return [greedy(f"h{i}", prompt(15 + i, i), tokens, placement="cpu_preferred") for i in range(3)]


# -- the host tier fails in the middle of a sweep ------------------------------------------------


@pytest.mark.parametrize("call", ["read_kv", "write_kv"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_stall_in_any_layer_voids_them_and_nobody_else(
    model: CausalLM, call: str, layer: int
) -> None:
    assert model.spec.layers == 3
    core, answers = core_of(model), Answers()
    requests = [*hosts(), greedy("g", prompt(20), 12)]
    for request in requests:
        core.handle(request)
    for _ in range(3):
        step(core, answers)
    tier, sweeps = host_of(core), list[tuple[IterationPlan, SweepResult]]()
    core.observe = lambda plan, result, seconds: sweeps.append((plan, result))
    original = getattr(tier, call)

    def stalling(at: int, *given: torch.Tensor) -> Any:
        if at == layer:
            tier.state = HostTierState.DEGRADED
        return original(at, *given)

    setattr(tier, call, stalling)
    step(core, answers)
    ((plan, result),) = sweeps
    (batch,) = plan.batches
    assert result.void == {row.key for row in batch.streamed}
    assert len(result.void) == 3
    assert set(result.tokens) == {row.key for row in batch.gpu_decode}
    setattr(tier, call, original)
    step(core, answers)
    assert not any(b.streamed for b in sweeps[-1][0].batches)
    tier.resume()
    while core.scheduler.live_requests:
        step(core, answers)
    check_empty(core)
    for request in requests:
        assert answers.tokens[request.request_id, 0] == alone(model, request)
        assert answers.usages[request.request_id].recomputations == 0


# -- int8 ----------------------------------------------------------------------------------------


def test_an_int8_pool_is_read_as_the_host_reads_it(model: CausalLM) -> None:
    """Log probabilities are near those of the host's own attention, and not those of exact KV."""
    requests = [greedy("a", prompt(40), 8, placement="cpu_preferred", logprobs=0)]
    told = []
    for blocks, kind in ((16, DType.INT8), (0, DType.INT8), (16, None)):
        core = core_of(model, blocks, kv_dtype=kind)
        answers = run(core, requests)
        told.append(torch.tensor([entry.logprob for entry in answers.logprobs["a", 0]]))
    ours, theirs, exact = told
    assert not torch.equal(ours, exact)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6


# -- memory --------------------------------------------------------------------------------------


def geometry(layers: int) -> AttentionGeometry:
    return AttentionGeometry(layers, 2, 1, 16, 16, 0.25, (0,) * layers)


def test_staging_counts_inside_the_gpu_pool() -> None:
    assert staging_cost(128, 32) == 16
    made = config("tiny", offload="auto", cpu_services=("a",), streamed_kv_blocks=7)
    with ThreadPool(1) as threads:
        kv = open_cpu_kv(made, geometry(4), torch.float32, threads)
        assert kv.blocks == made.gpu_kv_blocks - 7
        too_many = config("tiny", offload="auto", cpu_services=("a",), streamed_kv_blocks=400)
        with pytest.raises(ValueError, match="streamed_kv_blocks: staging for 400 host blocks"):
            open_cpu_kv(too_many, geometry(4), torch.float32, threads)


def test_without_a_host_tier_nothing_is_set_aside() -> None:
    made = config("tiny", offload="never", cpu_services=("a",), streamed_kv_blocks=7)
    with ThreadPool(1) as threads:
        assert open_cpu_kv(made, geometry(4), torch.float32, threads).blocks == made.gpu_kv_blocks


# -- the tests can fail --------------------------------------------------------------------------

MUTANTS = [
    ("self._fetch(layer + 1)", "self._fetch(layer)"),
    ("layer % 2, self._staged", "0, self._staged"),
    ("int(length) - 1, block_tokens", "int(length) - 2, block_tokens"),
    ("write_kv(layer, self._own, k, v)", "write_kv(layer, self._own, v, k)"),
    ("last % size)", "0)"),
    ("np.concatenate((np.zeros(1, np.int32), ends[:-1]))", "np.zeros_like(ends)"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_what_is_read_or_written_elsewhere_shows(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str
) -> None:
    requests = hosts()
    references = [alone(model, request) for request in requests]
    assert said_by(model, requests) == references
    mutant = mutated(streamed, old, new, tmp_path)
    monkeypatch.setattr(device_rows, "StreamedRows", mutant.StreamedRows)
    assert said_by(model, requests) != references


def said_by(model: CausalLM, requests: list[Submit]) -> list[list[int]]:
    answers = run(core_of(model), requests, steps=60)
    return [answers.tokens[r.request_id, 0] for r in requests]
