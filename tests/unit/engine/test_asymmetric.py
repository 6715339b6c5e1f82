"""Two sub-batches around a tiny model: who waits for whom, and what happens when the host, or
memory, lets them down."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gpu_service.engine import build
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Submit
from gpu_service.model.model import CausalLM, load_model
from gpu_service.offload.host_tier import HostTierStalled, HostTierState
from gpu_service.pipeline import asymmetric, host_lanes, runner
from gpu_service.scheduling.plan import IterationPlan, Mode, SweepResult
from kernels.cpu import ThreadPool
from tests.support.engine import (
    Answers,
    LocalHostTier,
    alone,
    check_empty,
    config,
    greedy,
    host_of,
    local_core,
    prompt,
    real_core,
    run,
    step,
)
from tests.support.models import tiny_model_dir
from tests.support.mutants import mutated
from tests.support.offload import TRANSPORTS, cpu_service

MEETING_SECONDS = 20.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "llama", "llama", head_dim=16)


@pytest.fixture(scope="module")
def model(directory: Path) -> CausalLM:
    return load_model(directory, dtype="float32")


def core_of(model: CausalLM, **changes: Any) -> EngineCore:
    values = {"offload": "auto", "offload_mode": "asymmetric", **changes}
    return local_core(config("tiny", cpu_services=("local",), **values), model, host_blocks=64)


def mixed(tokens: int = 12) -> list[Submit]:
    """Four on the host, two of which get into each sub-batch, and two on the GPU tier."""
    hosts = [greedy(f"h{i}", prompt(17, i), tokens, placement="cpu_preferred") for i in range(4)]
    return [*hosts, *(greedy(f"g{i}", prompt(30 + i), 2 * tokens) for i in range(2))]


class Log:
    """What a core has planned, and what came of it."""

    def __init__(self, core: EngineCore) -> None:
        self.sweeps: list[tuple[IterationPlan, SweepResult]] = []
        core.observe = lambda plan, result, seconds: self.sweeps.append((plan, result))

    @property
    def modes(self) -> set[Mode]:
        return {plan.mode for plan, _ in self.sweeps}


def drain(core: EngineCore, answers: Answers) -> None:
    while core.scheduler.live_requests:
        step(core, answers)
    check_empty(core)


# -- the two sides overlap -----------------------------------------------------------------------


class Meetings:
    """The host's attention of each lane and layer runs in a thread of its own, and ends only after
    it has met the engine's thread in a dense layer."""

    def __init__(self, core: EngineCore, seconds: float) -> None:
        self.met: list[tuple[int, int]] = []
        self._seconds = seconds
        self._unmet: list[tuple[tuple[int, int], threading.Barrier]] = []
        self._jobs: dict[tuple[int, int], Future[torch.Tensor]] = {}
        self._host = host_of(core)
        self._submit, self._attend = self._host.submit, self._host.wait
        self._host._threads = ThreadPool(1)  # the engine's is in use meanwhile
        self._host.submit, self._host.wait = self.submit, self.wait  # type: ignore[method-assign]
        self.executor = ThreadPoolExecutor(1)
        inner = core._runner
        assert isinstance(inner, runner.PlanRunner)
        self._model = inner._parts.model
        inner._parts = dataclasses.replace(inner._parts, model=self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def pre_projection(self, *given: Any) -> Any:
        self._meet()
        return self._model.pre_projection(*given)

    def post_projection(self, *given: Any) -> torch.Tensor:
        self._meet()
        return self._model.post_projection(*given)

    def _meet(self) -> None:
        if self._unmet:
            which, barrier = self._unmet.pop(0)
            barrier.wait(self._seconds)
            self.met.append(which)

    def submit(self, lane: int, layer: int, q: torch.Tensor, *kv: torch.Tensor) -> None:
        self._submit(lane, layer, q, *kv)
        barrier = threading.Barrier(2)

        def attend() -> torch.Tensor:
            barrier.wait(self._seconds)
            out = torch.empty_like(q)
            self._attend(lane, layer, out)
            return out

        self._unmet.append(((lane, layer), barrier))
        self._jobs[lane, layer] = self.executor.submit(attend)

    def wait(self, lane: int, layer: int, out: torch.Tensor, back: int = 0) -> None:
        out.copy_(self._jobs.pop((lane, layer)).result())


@contextmanager
def meetings(core: EngineCore, seconds: float) -> Iterator[Meetings]:
    found = Meetings(core, seconds)
    with found.executor:
        yield found


def test_the_host_attends_for_each_lane_while_the_device_is_in_the_other_s_dense_layers(
    model: CausalLM,
) -> None:
    core, requests = core_of(model), mixed()
    log = Log(core)
    with meetings(core, MEETING_SECONDS) as found:
        answers = run(core, requests)
    lanes = [bool(batch.host_decode) for plan, _ in log.sweeps for batch in plan.batches]
    assert Mode.ASYMMETRIC in log.modes
    assert sum(lanes) >= 20
    assert len(found.met) == model.spec.layers * sum(lanes), "they meet in every layer"
    for request in requests:
        assert answers.tokens[request.request_id, 0] == alone(model, request)


def test_in_inline_mode_they_never_meet(model: CausalLM) -> None:
    core = core_of(model, offload_mode="inline")
    answers = Answers()
    for request in mixed():
        core.handle(request)
    step(core, answers)  # prompts
    with meetings(core, 0.05) as found, pytest.raises(threading.BrokenBarrierError):
        step(core, answers)
    assert not found.met


# -- the host tier fails in the middle of a sweep ------------------------------------------------

STALLS = [
    ("begin_sweep", None, None),
    *((call, lane, layer) for call in ("submit", "wait") for lane in (0, 1) for layer in (0, 1, 2)),
]


def stall(tier: LocalHostTier, call: str, lane: int | None, layer: int | None) -> None:
    """That call does not come back in time."""
    original = getattr(tier, call)

    def stalling(*given: Any) -> Any:
        if call == "begin_sweep" or given[:2] == (lane, layer):
            setattr(tier, call, original)
            tier.state = HostTierState.DEGRADED
            raise HostTierStalled("the test says so")
        return original(*given)

    setattr(tier, call, stalling)


@pytest.mark.parametrize(("call", "lane", "layer"), STALLS)
def test_a_stall_in_any_layer_of_either_lane_voids_the_host_rows_of_both(
    model: CausalLM, call: str, lane: int | None, layer: int | None
) -> None:
    assert model.spec.layers == 3
    core, requests, answers = core_of(model), mixed(), Answers()
    for request in requests:
        core.handle(request)
    for _ in range(4):
        step(core, answers)
    log = Log(core)
    stall(host_of(core), call, lane, layer)
    step(core, answers)
    ((plan, result),) = log.sweeps
    assert plan.mode is Mode.ASYMMETRIC
    first, second = plan.batches
    assert first.host_decode
    hosts = {row.key for row in (*first.host_decode, *second.host_decode)}
    assert result.void == hosts
    assert set(result.tokens) == {row.key for row in first.gpu_decode}
    said = {key: len(tokens) for key, tokens in answers.tokens.items()}
    for _ in range(3):
        step(core, answers)
    for (name, index), tokens in answers.tokens.items():
        more = 3 if name.startswith("g") else 0
        assert len(tokens) == said[name, index] + more, "others must go on"
    host_of(core).resume()
    drain(core, answers)
    for request in requests:
        assert answers.tokens[request.request_id, 0] == alone(model, request)
        assert answers.usages[request.request_id].recomputations == 0


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_stall_while_a_prompt_for_the_host_is_stored(model: CausalLM, layer: int) -> None:
    core, requests, answers = core_of(model), mixed(), Answers()
    for request in requests:
        core.handle(request)
    for _ in range(4):
        step(core, answers)
    tier, log = host_of(core), Log(core)
    original = tier.write_kv

    def stalling(at: int, *given: torch.Tensor) -> None:
        if at == layer:
            tier.state = HostTierState.DEGRADED
        original(at, *given)

    tier.write_kv = stalling  # type: ignore[method-assign]
    late = greedy("late", prompt(25, 9), 6, placement="cpu_preferred")
    core.handle(late)
    step(core, answers)
    ((plan, result),) = log.sweeps
    rows = {row.key for batch in plan.batches for row in (*batch.prefill, *batch.host_decode)}
    assert result.void == rows
    assert set(result.tokens) == {row.key for row in plan.batches[0].gpu_decode}
    tier.write_kv = original  # type: ignore[method-assign]
    tier.resume()
    drain(core, answers)
    for request in (*requests, late):
        assert answers.tokens[request.request_id, 0] == alone(model, request)


# -- memory runs out -----------------------------------------------------------------------------


def fail_once(core: EngineCore, layer: int, tokens: int) -> None:
    """The GPU pool's store of that many tokens runs out of memory."""
    gpu = core._runner._parts.gpu  # type: ignore[attr-defined]
    original = gpu.write

    def failing(at: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if at == layer and len(slots) == tokens:
            gpu.write = original
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        original(at, slots, k, v)

    gpu.write = failing


def check_out_of_memory(core: EngineCore, model: CausalLM, layer: int) -> None:
    answers, log = Answers(), Log(core)
    requests = mixed()
    for request in requests:
        core.handle(request)
    for _ in range(4):
        step(core, answers)
    fail_once(core, layer, 33)
    core.handle(greedy("big", prompt(33), 4, placement="gpu_only"))
    drain(core, answers)
    assert Mode.ASYMMETRIC in log.modes
    assert {r: x.reason for r, x in answers.refusals.items()} == {"big": "OUT_OF_MEMORY"}
    for request in requests:
        assert answers.tokens[request.request_id, 0] == alone(model, request)
        assert answers.usages[request.request_id].recomputations == 0


@pytest.mark.parametrize("layer", [0, 2])
def test_running_out_of_memory_ends_one_request(model: CausalLM, layer: int) -> None:
    check_out_of_memory(core_of(model), model, layer)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_real_cpu_service_drops_both_lanes_when_memory_runs_out(
    directory: Path, model: CausalLM, tmp_path: Path, transport: str
) -> None:
    with cpu_service(tmp_path) as service:
        made = config(
            directory,
            cpu_services=(service.address,),
            offload="auto",
            offload_mode="asymmetric",
            offload_transport=transport,
            host_kv_gib=0.01,
            sweep_deadline_ms=30_000,
        )
        with real_core(made) as core:
            check_out_of_memory(core, model, 1)


# -- the tests can fail --------------------------------------------------------------------------

USED_AS = {
    asymmetric: (runner, "run_asymmetric"),
    host_lanes: (asymmetric, "HostLanes"),
    runner: (build, "PlanRunner"),
}
"""Whom to give the mutant to, and as what."""
MUTANTS = [
    (asymmetric, "self._batch.positions)", "self._batch.positions - 1)"),
    (asymmetric, "post_projection(layer,", "post_projection(0,"),
    (asymmetric, "pre_projection(layer,", "pre_projection(0,"),
    (asymmetric, "submit(self._lane,", "submit(1 - self._lane,"),
    (asymmetric, "wait(self._lane,", "wait(1 - self._lane,"),
    (asymmetric, "[first.outcome(), second.outcome()]", "[second.outcome(), first.outcome()]"),
    (host_lanes, "for t in tables]", "for t in tables[::-1]]"),
    (runner, "chosen[key] = start + row", "chosen[key] = row"),
]


@pytest.mark.parametrize(("module", "old", "new"), MUTANTS)
def test_lanes_that_are_mixed_up_show(
    model: CausalLM,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    module: ModuleType,
    old: str,
    new: str,
) -> None:
    """Both lanes have as many rows, so that shapes do not tell."""
    requests = [greedy(f"h{i}", prompt(17, i), 6) for i in range(4)]
    references = [alone(model, request) for request in requests]
    assert said_by(model, requests) == references
    user, name = USED_AS[module]
    monkeypatch.setattr(user, name, getattr(mutated(module, old, new, tmp_path), name))
    assert said_by(model, requests) != references


def said_by(model: CausalLM, requests: list[Submit]) -> list[list[int]]:
    answers = run(core_of(model, offload="always"), requests, steps=60)
    return [answers.tokens[r.request_id, 0] for r in requests]
