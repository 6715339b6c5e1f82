"""Deferred attention as a CUDA device does it, in Triton's interpreter, with a real cpu_service:
rows leave and come back from within sweeps, and tokens are those of `transformers`."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from gpu_service.engine.messages import Abort, Submit
from gpu_service.offload.host_tier import HostTierState
from gpu_service.pipeline.cuda.runner import CudaRunner, QueuedSweep
from gpu_service.scheduling.plan import IterationPlan, Mode
from kernels.gpu import host_exchange
from tests.support.engine import (
    Answers,
    check_empty,
    greedy,
    run,
    step,
)
from tests.support.models import FAMILIES, greedy_tokens, reference_model
from tests.support.offload import cpu_service
from tests.support.on_triton import check_draws, served_core
from tests.support.stack import Service

OUTPUT = 6
LENGTHS = (1, 17, 30)
deferred = partial(served_core, offload_mode="deferred")


def prompts() -> list[list[int]]:
    return [[3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS]


def requests(**sampling: Any) -> list[Submit]:
    return [greedy(f"r{i}", prompt, OUTPUT, **sampling) for i, prompt in enumerate(prompts())]


@pytest.mark.parametrize(
    ("family", "every"),
    [
        ("llama", 3),
        *(pytest.param(family, n, marks=pytest.mark.slow) for family in FAMILIES for n in (1, 4)),
    ],
)
def test_tokens_are_those_of_transformers(
    directories: dict[str, Path], service: Service, family: str, every: int
) -> None:
    with deferred(directories[family], service, force_migration_every=every) as core:
        modes: list[Mode] = []
        core.observe = lambda plan, result, seconds: modes.append(plan.mode)
        answers = run(core, requests())
    reference = reference_model(directories[family])
    for i, prompt in enumerate(prompts()):
        assert answers.tokens[f"r{i}", 0] == greedy_tokens(reference, prompt, OUTPUT)
    assert sum(usage.host_tokens for usage in answers.usages.values()) > 0
    assert Mode.DEFERRED in modes


def test_a_short_gpu_pool_sends_choices_down(
    directories: dict[str, Path], service: Service
) -> None:
    """Prompts are computed on the GPU tier, whose newest choice makes room; sweeps are decided
    ahead of what is under way."""
    asked = [greedy(f"r{i}", [3 + (7 * i + k) % 250 for k in range(20)], 5) for i in range(3)]
    with deferred(directories["llama"], service, gpu_kv_blocks=4, force_migration_every=0) as core:
        ahead: list[bool] = []
        schedule = core.scheduler.schedule

        def deciding(now: float) -> IterationPlan:
            ahead.append(bool(core.scheduler.state.flights) and core._flight is not None)
            return schedule(now)

        core.scheduler.schedule = deciding  # type: ignore[method-assign]
        answers = run(core, asked)
        check_empty(core)
    reference = reference_model(directories["llama"])
    for request in asked:
        expected = greedy_tokens(reference, request.prompt_token_ids, 5)
        assert answers.tokens[request.request_id, 0] == expected
    assert sum(usage.host_tokens for usage in answers.usages.values()) > 0
    assert sum(ahead) > 5


def test_aborts_and_draws_under_way(directories: dict[str, Path], service: Service) -> None:
    """Blocks of an aborted row are used again only when it has landed; host rows draw on the device
    as others do."""
    sampling = {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "logprobs": 2}
    kept = requests(**sampling)
    with deferred(directories["llama"], service, host_kv_gib=0.0002) as core:
        answers = Answers()
        for request in (*kept, greedy("gone", [5] * 25, 30)):
            core.handle(request)
        while not core.scheduler.state.flights or ("gone", 0) not in answers.tokens:
            step(core, answers)
        core.handle(Abort("gone"))
        while core.scheduler.live_requests or core.scheduler.state.flights:
            step(core, answers)
            core.scheduler.state.check_integrity()
        check_empty(core)
    check_draws(directories["llama"], kept, answers)


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_host_that_goes_away_under_way(
    directories: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
) -> None:
    """The device's waits end, nobody else waits, and the tokens are right in the end."""
    monkeypatch.setattr(host_exchange, "_MOST_POLLS", 20_000)
    hosts = [
        greedy(f"h{i}", prompt, 5, placement="cpu_preferred")
        for i, prompt in enumerate(prompts()[:2])
    ]
    with (
        cpu_service(tmp_path) as service,
        deferred(directories["llama"], service, force_migration_every=0) as core,
    ):
        answers = Answers()
        core.handle(greedy("gpu", [7] * 12, 30))
        for request in hosts:
            core.handle(request)
        while sum(len(tokens) for (name, _), tokens in answers.tokens.items() if name != "gpu") < 3:
            step(core, answers)
        service.signal(how)
        said = len(answers.tokens["gpu", 0])
        while core.host.state is HostTierState.UP:
            step(core, answers)
        for _ in range(3):
            step(core, answers)
        assert len(answers.tokens["gpu", 0]) >= said + 3
        if how is signal.SIGKILL:
            service.wait_exit()
            service.start()
        else:
            service.signal(signal.SIGCONT)
        while core.scheduler.live_requests or core.scheduler.state.flights:
            step(core, answers)
        check_empty(core)
    reference = reference_model(directories["llama"])
    for request in hosts:
        expected = greedy_tokens(reference, request.prompt_token_ids, 5)
        assert answers.tokens[request.request_id, 0] == expected
        assert answers.usages[request.request_id].recomputations == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["deferred", "inline", "asymmetric"])
def test_rows_given_up_for_memory_do_not_stay_with_the_host(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A sweep that is published and never launched would leave its rows to a worker that takes the
    next sweep's doorbells for theirs, and writes into blocks that others have by then."""
    asked = [
        greedy(f"h{i}", prompt, 3, placement="cpu_preferred")
        for i, prompt in enumerate(prompts()[:2])
    ]
    with (
        cpu_service(tmp_path) as service,
        deferred(directories["llama"], service, offload_mode=mode, force_migration_every=0) as core,
    ):
        queue, failed = CudaRunner._queue, []

        def fails_once(runner: CudaRunner, plan: IterationPlan, *rest: Any) -> QueuedSweep:
            waited = any(batch.host_decode for batch in plan.batches) and mode != "deferred"
            if not failed and (waited or core.scheduler.state.flights):
                failed.append(core.host.epoch)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return queue(runner, plan, *rest)

        monkeypatch.setattr(CudaRunner, "_queue", fails_once)
        answers = Answers()
        for request in asked:
            core.handle(request)
        while core.scheduler.live_requests or core.scheduler.state.flights:
            step(core, answers)
            core.scheduler.state.check_integrity()
        check_empty(core)
        assert failed
        assert core.host.epoch > failed[0]
    reference = reference_model(directories["llama"])
    for request in asked:
        if request.request_id not in answers.refusals:
            expected = greedy_tokens(reference, request.prompt_token_ids, 3)
            assert answers.tokens[request.request_id, 0] == expected
    assert {x.reason for x in answers.refusals.values()} == {"OUT_OF_MEMORY"}
