"""Rows that attend on the device over the host's KV: tokens are those of `transformers`, mixed with
every other way to run, from one iteration to the next."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Submit
from gpu_service.model.model import load_model
from gpu_service.offload.host_tier import HostTierState
from tests.support.engine import (
    Answers,
    check_empty,
    config,
    greedy,
    local_core,
    real_core,
    run,
    step,
)
from tests.support.models import FAMILIES, greedy_tokens, reference_model, tiny_model_dir
from tests.support.offload import TRANSPORTS, cpu_service
from tests.support.stack import Service

OUTPUT = 12
LENGTHS = (1, 15, 16, 17, 61)
HOW: dict[str, dict[str, Any]] = {
    "all": {"offload": "always", "streamed_kv_blocks": 64},
    "some": {"offload": "always", "streamed_kv_blocks": 6, "max_batch_tokens": 7},
    "forced-inline": {"offload": "auto", "streamed_kv_blocks": 6, "force_migration_every": 1},
    "forced-deferred": {
        "offload": "auto",
        "offload_mode": "deferred",
        "streamed_kv_blocks": 2,
        "force_migration_every": 3,
    },
    "some-asymmetric": {
        "offload": "always",
        "offload_mode": "asymmetric",
        "streamed_kv_blocks": 3,
        "max_batch_tokens": 7,
    },
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model_dir(root / name, name, head_dim=16) for name in FAMILIES}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with cpu_service(tmp_path_factory.mktemp("cpu")) as running:
        yield running


def requests() -> list[Submit]:
    prompts = ([3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS)
    return [greedy(f"r{i}", prompt, OUTPUT) for i, prompt in enumerate(prompts)]


def check_tokens(directory: Path, answers: Answers) -> None:
    reference = reference_model(directory)
    for request in requests():
        expected = greedy_tokens(reference, request.prompt_token_ids, OUTPUT)
        assert answers.tokens[request.request_id, 0] == expected


def watch(core: EngineCore) -> dict[str, int]:
    """Counts rows of sweeps to come, by where they attend."""
    rows = {"streamed": 0, "host": 0}

    def observe(plan: Any, result: Any, seconds: float) -> None:
        rows["streamed"] += sum(len(batch.streamed) for batch in plan.batches)
        rows["host"] += sum(len(batch.host_decode) for batch in plan.batches)

    core.observe = observe
    return rows


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(
    directories: dict[str, Path], family: str, how: str
) -> None:
    directory = directories[family]
    made = config(directory, cpu_services=("local",), **HOW[how])
    core = local_core(made, load_model(directory, dtype="float32"), host_blocks=64)
    rows = watch(core)
    answers = run(core, requests())
    check_tokens(directory, answers)
    assert rows["streamed"] > 0
    # A prompt of one token decodes where it is admitted.
    assert (rows["host"] > 1) == (how != "all")
    if how == "all":  # but for the first ones, which their prompts draw
        later = (OUTPUT - 1) * len(LENGTHS)
        assert sum(usage.gpu_tokens for usage in answers.usages.values()) >= later


@pytest.mark.parametrize(
    ("transport", "how"),
    [("shm", "all"), ("shm", "forced-deferred"), *((t, "forced-inline") for t in TRANSPORTS)],
)
def test_a_real_cpu_service_gives_the_same_tokens(
    directories: dict[str, Path], service: Service, transport: str, how: str
) -> None:
    made = config(
        directories["mistral"],
        cpu_services=(service.address,),
        offload_transport=transport,
        host_kv_gib=0.01,
        sweep_deadline_ms=30_000,
        **HOW[how],
    )
    with real_core(made) as core:
        rows = watch(core)
        check_tokens(directories["mistral"], run(core, requests()))
    assert rows["streamed"] > 0


def test_a_killed_cpu_service_keeps_them_waiting_and_no_more(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    """While it is away nobody decodes on the host tier, over the link neither; then all go on with
    the KV that they had."""
    asked = [greedy(f"r{i}", [5 + i] * (10 + i), 12) for i in range(3)]
    with cpu_service(tmp_path) as service:
        made = config(
            directories["llama"],
            cpu_services=(service.address,),
            host_kv_gib=0.01,
            sweep_deadline_ms=30_000,
            **HOW["all"],
        )
        with real_core(made) as core:
            rows, answers = watch(core), Answers()
            for request in asked:
                core.handle(request)
            while rows["streamed"] < 6:
                step(core, answers)
            service.signal(signal.SIGKILL)
            service.wait_exit()
            while core.host.state is HostTierState.UP:
                step(core, answers)
            before = dict(rows)
            for _ in range(5):
                step(core, answers)
            assert rows == before
            service.start()
            while core.scheduler.live_requests:
                step(core, answers)
            check_empty(core)
    reference = reference_model(directories["llama"])
    for request in asked:
        expected = greedy_tokens(reference, request.prompt_token_ids, 12)
        assert answers.tokens[request.request_id, 0] == expected
        assert answers.usages[request.request_id].recomputations == 0
