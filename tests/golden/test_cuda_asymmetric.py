"""Host rows that a CUDA device waits for in the layer where they leave, in two sub-batches or in
one, in Triton's interpreter and with a real cpu_service: tokens are those of `transformers`."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Abort, Submit
from gpu_service.offload.host_tier import HostTierState
from gpu_service.pipeline.cuda import host_rows, inputs, queued
from gpu_service.scheduling.plan import IterationPlan, Mode, SweepResult
from kernels.gpu import host_exchange
from tests.support.engine import (
    Answers,
    check_empty,
    greedy,
    run,
    step,
)
from tests.support.models import FAMILIES, greedy_tokens, reference_model
from tests.support.mutants import mutated
from tests.support.offload import cpu_service
from tests.support.on_triton import check_draws, served_core
from tests.support.stack import Service

OUTPUT = 5
LENGTHS = (1, 17, 22)
waiting = partial(served_core, offload_mode="asymmetric")
KINDS = ("prefill", "gpu_decode", "streamed", "host_decode")


def requests(**sampling: Any) -> list[Submit]:
    prompts = ([3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS)
    return [greedy(f"r{i}", prompt, OUTPUT, **sampling) for i, prompt in enumerate(prompts)]


class Log:
    """What was planned, and what came of it."""

    def __init__(self, core: EngineCore) -> None:
        self.sweeps: list[tuple[IterationPlan, SweepResult]] = []
        core.observe = lambda plan, result, seconds: self.sweeps.append((plan, result))

    @property
    def modes(self) -> set[Mode]:
        return {plan.mode for plan, _ in self.sweeps}

    @property
    def firsts(self) -> set[str]:
        """Kinds of rows that first sub-batches of two have had."""
        batches = (plan.batches[0] for plan, _ in self.sweeps if len(plan.batches) == 2)
        return {kind for batch in batches for kind in KINDS if getattr(batch, kind)}

    @property
    def void(self) -> int:
        return sum(len(result.void) for _, result in self.sweeps)


def check_tokens(directory: Path, asked: list[Submit], answers: Answers) -> None:
    reference = reference_model(directory)
    for request in asked:
        tokens = answers.tokens[request.request_id, 0]
        assert len(tokens) == request.sampling.max_tokens
        assert tokens == greedy_tokens(reference, request.prompt_token_ids, len(tokens))


@pytest.mark.parametrize(
    ("family", "mode", "every"),
    [
        ("llama", "asymmetric", 2),
        ("qwen3", "inline", 3),
        *(
            pytest.param(family, mode, every, marks=pytest.mark.slow)
            for family in FAMILIES
            for mode in ("asymmetric", "inline")
            for every in (1, 4)
        ),
    ],
)
def test_tokens_are_those_of_transformers(
    directories: dict[str, Path], service: Service, family: str, mode: str, every: int
) -> None:
    """Choices change their tier from sweep to sweep; prompts, GPU rows and host rows go together,
    and in two sub-batches, or there are none of a kind."""
    changes = {"offload_mode": mode, "force_migration_every": every}
    with waiting(directories[family], service, **changes) as core:
        log, asked = Log(core), requests()
        check_tokens(directories[family], asked, run(core, asked))
    host = [plan for plan, _ in log.sweeps if any(batch.host_decode for batch in plan.batches)]
    assert any(plan.batches[0].gpu_decode for plan in host)
    assert (Mode.ASYMMETRIC in log.modes) == (mode == "asymmetric")
    assert Mode.INLINE in log.modes


@pytest.mark.slow
def test_more_rows_than_were_captured(directories: dict[str, Path], service: Service) -> None:
    """Both sub-batches are larger than the largest padded size; chunks of prompts beside them."""
    asked = [
        greedy(f"r{i}", [3 + (5 * i + k) % 250 for k in range(4 + i)], 6, placement="cpu_preferred")
        for i in range(7)
    ]
    asked.append(greedy("late", [7] * 40, 4))
    changes = {"max_batch_tokens": 12, "force_migration_every": 0}
    with waiting(directories["llama"], service, **changes) as core:
        log = Log(core)
        check_tokens(directories["llama"], asked, run(core, asked))
    most = max(min(len(b.host_decode) for b in p.batches) for p, _ in log.sweeps if p.batches)
    assert most >= 3
    assert log.firsts == {"prefill", "gpu_decode", "host_decode"}


@pytest.mark.slow
def test_prompts_and_rows_go_through_staging_beside_host_rows(
    directories: dict[str, Path], service: Service
) -> None:
    """Prompts for the host tier are computed in the first sub-batch, and rows stream there."""
    asked = [
        greedy(f"r{n}", [3 + (7 * i + n) % 250 for i in range(n)], 5, placement="cpu_preferred")
        for n in (41, 20, 9, 5)
    ]
    changes = {
        "gpu_kv_blocks": 9,
        "streamed_kv_blocks": 6,
        "force_migration_every": 0,
        "max_batch_tokens": 17,
    }
    with waiting(directories["mistral"], service, **changes) as core:
        log = Log(core)
        check_tokens(directories["mistral"], asked, run(core, asked))
    assert {"prefill", "streamed"} <= log.firsts


@pytest.mark.slow
def test_draws_on_the_device_and_aborts(directories: dict[str, Path], service: Service) -> None:
    sampling = {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "logprobs": 2}
    kept = requests(**sampling)
    with waiting(directories["llama"], service, host_kv_gib=0.0002) as core:
        log, answers = Log(core), Answers()
        for request in (*kept, greedy("gone", [5] * 25, 30, placement="cpu_preferred")):
            core.handle(request)
        while Mode.ASYMMETRIC not in log.modes or ("gone", 0) not in answers.tokens:
            step(core, answers)
        core.handle(Abort("gone"))
        while core.scheduler.live_requests:
            step(core, answers)
            core.scheduler.state.check_integrity()
        check_empty(core)
    check_draws(directories["llama"], kept, answers)


@pytest.mark.parametrize(
    "how", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_host_that_does_not_answer_in_time(
    directories: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
) -> None:
    """The device's waits end, the host rows of that sweep are void and nobody else's are; they are
    repeated when the host is back, from the KV that it has."""
    monkeypatch.setattr(host_exchange, "_MOST_POLLS", 20_000)
    hosts = [greedy(f"h{n}", [3] * n, 4, placement="cpu_preferred") for n in (1, 17)]
    with (
        cpu_service(tmp_path) as service,
        waiting(directories["llama"], service, force_migration_every=0) as core,
    ):
        log, answers = Log(core), Answers()
        for request in (greedy("gpu", [7] * 12, 40), *hosts):
            core.handle(request)
        while Mode.ASYMMETRIC not in log.modes:
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
        while core.scheduler.live_requests:
            step(core, answers)
        check_empty(core)
    assert log.void >= 2
    check_tokens(directories["llama"], hosts, answers)
    assert all(answers.usages[request.request_id].recomputations == 0 for request in hosts)


# -- mutants -------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[ModuleType, str, str, str]] = {
    "both-on-one-lane": (
        host_rows,
        "exchange.waited(self._lane, layer)",
        "exchange.waited(0, layer)",
        "forward.WaitedRows",
    ),
    "positions-of-padding": (
        inputs,
        'arrays["positions"][place] = row.length - 1',
        'arrays["positions"][place] = 0',
        "build.SweepInputs",
    ),
    "tokens-of-the-other-rows": (
        queued,
        "firsts = shape.sequences, shape.sequences + shape.host",
        "firsts = shape.sequences + shape.host, shape.sequences",
        "runner.arriving_rows",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(
    directories: dict[str, Path],
    service: Service,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, old, new, user = MUTANTS[name]
    mutant = mutated(module, old, new, tmp_path)
    made = getattr(mutant, user.rpartition(".")[2])
    monkeypatch.setattr(f"gpu_service.pipeline.cuda.{user}", made)
    asked = [
        greedy(f"h{n}", [3 + 7 * i % 250 for i in range(n)], 4, placement="cpu_preferred")
        for n in (20, 5)
    ]
    with waiting(directories["llama"], service, force_migration_every=0) as core:
        log = Log(core)
        answers = run(core, asked, steps=400)
    assert Mode.ASYMMETRIC in log.modes
    with pytest.raises(AssertionError):
        check_tokens(directories["llama"], asked, answers)
