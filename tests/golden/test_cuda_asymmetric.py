"""Host rows that a CUDA device waits for in the layer where they leave, in two sub-batches or in
one, in Triton's interpreter and with a real cpu_service: tokens are those of `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Submit
from gpu_service.model.model import load_model
from gpu_service.scheduling.plan import IterationPlan, Mode, SweepResult
from tests.support.engine import Answers, config, greedy, run, triton_core
from tests.support.models import FAMILIES, greedy_tokens, reference_model, tiny_model_dir
from tests.support.offload import cpu_service
from tests.support.stack import Service

OUTPUT = 6
LENGTHS = (1, 17, 30)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with cpu_service(tmp_path_factory.mktemp("cpu")) as running:
        yield running


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model_dir(root / name, name, head_dim=16) for name in FAMILIES}


def requests(**sampling: Any) -> list[Submit]:
    prompts = ([3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS)
    return [greedy(f"r{i}", prompt, OUTPUT, **sampling) for i, prompt in enumerate(prompts)]


@contextmanager
def waiting(directory: Path, service: Service, **changes: Any) -> Iterator[EngineCore]:
    values = {
        "offload_mode": "asymmetric",
        "force_migration_every": 3,
        "max_batch_tokens": 24,
        "host_kv_gib": 0.01,
        "sweep_deadline_ms": 30_000,
    }
    made = config(
        directory,
        offload="auto",
        cpu_services=(service.address,),
        max_running_requests=8,
        **{**values, **changes},
    )
    core = triton_core(made, load_model(directory, dtype="float32"))
    try:
        yield core
    finally:
        core.close()


class Log:
    """What was planned, and what came of it."""

    def __init__(self, core: EngineCore) -> None:
        self.sweeps: list[tuple[IterationPlan, SweepResult]] = []
        core.observe = lambda plan, result, seconds: self.sweeps.append((plan, result))

    def ran(self, *sides: set[str]) -> bool:
        """Some sweep had rows of these kinds, by sub-batch."""
        return any(list(map(kinds, plan.batches)) == list(sides) for plan, _ in self.sweeps)

    @property
    def seen(self) -> set[tuple[frozenset[str], ...]]:
        return {tuple(frozenset(kinds(b)) for b in plan.batches) for plan, _ in self.sweeps}


def kinds(batch: Any) -> set[str]:
    return {n for n in ("prefill", "gpu_decode", "host_decode", "streamed") if getattr(batch, n)}


def check_tokens(directory: Path, asked: list[Submit], answers: Answers) -> None:
    reference = reference_model(directory)
    for request in asked:
        tokens = answers.tokens[request.request_id, 0]
        assert len(tokens) == request.sampling.max_tokens
        assert tokens == greedy_tokens(reference, request.prompt_token_ids, len(tokens))


@pytest.mark.parametrize("mode", ["asymmetric", "inline"])
@pytest.mark.parametrize(
    ("family", "every"),
    [
        ("llama", 3),
        *(pytest.param(family, n, marks=pytest.mark.slow) for family in FAMILIES for n in (1, 4)),
    ],
)
def test_tokens_are_those_of_transformers(
    directories: dict[str, Path], service: Service, family: str, every: int, mode: str
) -> None:
    changes = {"offload_mode": mode, "force_migration_every": every}
    with waiting(directories[family], service, **changes) as core:
        log, asked = Log(core), requests()
        check_tokens(directories[family], asked, run(core, asked))
    print(log.seen)
    assert any(plan.mode is Mode.ASYMMETRIC for plan, _ in log.sweeps) == (mode == "asymmetric")
