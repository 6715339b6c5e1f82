"""Deferred attention as a CUDA device does it, in Triton's interpreter, with a real cpu_service:
rows leave and come back from within sweeps, and tokens are those of `transformers`."""

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
from gpu_service.scheduling.plan import Mode
from tests.support.engine import config, greedy, run, triton_core
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


def prompts() -> list[list[int]]:
    return [[3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS]


def requests(**sampling: Any) -> list[Submit]:
    return [greedy(f"r{i}", prompt, OUTPUT, **sampling) for i, prompt in enumerate(prompts())]


@contextmanager
def deferred(directory: Path, service: Service, **changes: Any) -> Iterator[EngineCore]:
    made = config(
        directory,
        offload="auto",
        offload_mode="deferred",
        cpu_services=(service.address,),
        host_kv_gib=0.01,
        max_running_requests=8,
        sweep_deadline_ms=30_000,
        **{"force_migration_every": 3, "max_batch_tokens": 24, **changes},
    )
    core = triton_core(made, load_model(directory, dtype="float32"))
    try:
        yield core
    finally:
        core.close()


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
