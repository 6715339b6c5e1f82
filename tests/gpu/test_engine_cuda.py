"""The engine on a CUDA device with a real cpu_service: the same greedy tokens as `transformers`.

In fp32, with TF32 off, tokens must be identical wherever a request ran; in bf16 they are held to
what `transformers` itself is off by in bf16.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.config import GpuServiceConfig
from gpu_service.engine.messages import Submit
from gpu_service.offload.host_tier import HostTierState
from gpu_service.pipeline.cuda.inputs import SweepShape
from gpu_service.scheduling.plan import IterationPlan, SweepResult
from tests.support.engine import Answers, check_empty, config, greedy, real_core, run, step
from tests.support.models import FAMILIES, greedy_tokens, reference_model, tiny_model_dir
from tests.support.numerics import check_teacher_forced
from tests.support.offload import TRANSPORTS, cpu_service
from tests.support.stack import Service

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

OUTPUT = 24
LENGTHS = (1, 15, 16, 17, 61)
HOW = {
    "never": {"offload": "never"},
    "never-chunked": {"offload": "never", "max_batch_tokens": 7},
    "always-chunked": {"offload": "always", "max_batch_tokens": 7},
    "small-gpu-pool": {"offload": "auto", "gpu_kv_blocks": 8},
    "forced-1": {"offload": "auto", "force_migration_every": 1},
    "deferred-2": {"offload": "auto", "offload_mode": "deferred", "force_migration_every": 2},
    "deferred-7-chunked": {
        "offload": "auto",
        "offload_mode": "deferred",
        "force_migration_every": 7,
        "max_batch_tokens": 7,
    },
    "asymmetric-1": {"offload": "auto", "offload_mode": "asymmetric", "force_migration_every": 1},
    "asymmetric-2-chunked": {
        "offload": "auto",
        "offload_mode": "asymmetric",
        "force_migration_every": 2,
        "max_batch_tokens": 7,
    },
    "asymmetric-small-gpu-pool": {
        "offload": "auto",
        "offload_mode": "asymmetric",
        "gpu_kv_blocks": 8,
    },
    "asymmetric-staged-prompts": {
        "offload": "auto",
        "offload_mode": "asymmetric",
        "streamed_kv_blocks": 6,
        "gpu_kv_blocks": 9,
        "max_batch_tokens": 17,
    },
    "streamed-3": {
        "offload": "auto",
        "offload_mode": "deferred",
        "streamed_kv_blocks": 6,
        "force_migration_every": 3,
        "max_batch_tokens": 24,
    },
    # One block is left for the GPU tier's own: prompts go through staging, and come back for more.
    "staged-prompts": {
        "offload": "auto",
        "offload_mode": "deferred",
        "streamed_kv_blocks": 6,
        "gpu_kv_blocks": 9,
        "max_batch_tokens": 17,
    },
}
GRPC = {
    how
    for how, changes in HOW.items()
    if changes.get("offload_mode") != "deferred" and "streamed_kv_blocks" not in changes
}
WAYS = [
    (transport, how) for transport in TRANSPORTS for how in HOW if transport == "shm" or how in GRPC
]


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


def on_cuda(directory: Path, service: Service, dtype: str, **changes: Any) -> GpuServiceConfig:
    values = {
        "host_kv_gib": 0.01,
        "sweep_deadline_ms": 30_000,
        # Few graphs to capture: each test starts an engine.
        "max_running_requests": 8,
        **changes,
    }
    return config(directory, device="cuda", dtype=dtype, cpu_services=(service.address,), **values)


@pytest.mark.parametrize(("transport", "how"), WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(
    directories: dict[str, Path], service: Service, family: str, transport: str, how: str
) -> None:
    made = on_cuda(directories[family], service, "float32", offload_transport=transport, **HOW[how])
    with real_core(made) as core:
        answers = run(core, requests())
    reference = reference_model(directories[family])
    for i, prompt in enumerate(prompts()):
        assert answers.tokens[f"r{i}", 0] == greedy_tokens(reference, prompt, OUTPUT)
    host = sum(usage.host_tokens for usage in answers.usages.values())
    assert (host > 0) == (made.offload != "never")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_and_tokens(
    directories: dict[str, Path], service: Service, family: str, how: str
) -> None:
    with real_core(on_cuda(directories[family], service, "bfloat16", **HOW[how])) as core:
        answers = run(core, requests(logprobs=0))
    check_teacher_forced(
        reference_model(directories[family]),
        reference_model(directories[family], torch.bfloat16),
        prompts(),
        [answers.tokens[f"r{i}", 0] for i in range(len(LENGTHS))],
        [answers.logprobs[f"r{i}", 0] for i in range(len(LENGTHS))],
    )


@pytest.mark.parametrize("max_batch_tokens", [7, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_give_the_tokens_of_single_launches(
    directories: dict[str, Path], service: Service, family: str, max_batch_tokens: int
) -> None:
    """In bf16: the same kernels on the same padded sizes give the same bits."""
    made = on_cuda(
        directories[family],
        service,
        "bfloat16",
        offload="never",
        max_batch_tokens=max_batch_tokens,
    )
    found, replayed = [], []
    for graphs in (True, False):
        with real_core(made) as core:
            sweeps = core._runner._sweeps  # type: ignore[attr-defined]
            replay = sweeps.graphs.replay

            def replaying(shape: SweepShape, replay: Any = replay, graphs: bool = graphs) -> bool:
                replayed.append(graphs and replay(shape))
                return bool(replayed[-1])

            sweeps.graphs.replay = replaying
            answers = run(core, requests(logprobs=0))
        found.append((answers.tokens, answers.logprobs))
    assert any(replayed), "no sweep came from a graph"
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", ["asymmetric", "inline"])
def test_sweeps_with_host_rows_come_from_graphs(
    directories: dict[str, Path], service: Service, mode: str
) -> None:
    made = on_cuda(
        directories["llama"],
        service,
        "float32",
        offload="auto",
        offload_mode=mode,
        force_migration_every=2,
    )
    replayed: list[SweepShape] = []
    with real_core(made) as core:
        sweeps = core._runner._sweeps  # type: ignore[attr-defined]
        replay = sweeps.graphs.replay

        def replaying(shape: SweepShape) -> bool:
            found = bool(replay(shape))
            replayed.extend([shape] * found)
            return found

        sweeps.graphs.replay = replaying
        run(core, requests())
    with_host = [shape for shape in replayed if shape.host or shape.second]
    assert with_host
    assert any(shape.second for shape in with_host) == (mode == "asymmetric")


@pytest.mark.parametrize("mode", ["asymmetric", "inline", "deferred"])
def test_a_host_that_does_not_answer_in_time(
    directories: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    """The device's waits end by its own clock; what the host should have given is repeated."""
    hosts = [greedy(f"h{n}", [3] * n, 12, placement="cpu_preferred") for n in (1, 17, 20)]
    asked = [greedy("gpu", [7] * 12, 40), *hosts]
    with cpu_service(tmp_path) as service:
        made = on_cuda(
            directories["llama"],
            service,
            "float32",
            offload="auto",
            offload_mode=mode,
            sweep_deadline_ms=300,
        )
        with real_core(made) as core:
            answers = Answers()
            for request in asked:
                core.handle(request)
            while not sum(len(answers.tokens.get((r.request_id, 0), ())) > 1 for r in hosts):
                step(core, answers)
            service.signal(signal.SIGSTOP)
            while core.host.state is HostTierState.UP:
                step(core, answers)
            for _ in range(3):
                step(core, answers)
            service.signal(signal.SIGCONT)
            while core.scheduler.live_requests or core.scheduler.state.flights:
                step(core, answers)
            check_empty(core)
    reference = reference_model(directories["llama"])
    for request in asked:
        tokens = answers.tokens[request.request_id, 0]
        assert tokens == greedy_tokens(reference, request.prompt_token_ids, len(tokens))
        assert len(tokens) == request.sampling.max_tokens


def test_copies_run_beside_sweeps(directories: dict[str, Path], service: Service) -> None:
    """Demotions of choices that nobody's row needs; forced ones never run in this way."""
    asked = [greedy(f"r{i}", prompt, 60) for i, prompt in enumerate(prompts())]
    made = on_cuda(
        directories["llama"],
        service,
        "float32",
        offload="auto",
        offload_mode="deferred",
        gpu_kv_blocks=8,
    )
    beside = 0
    with real_core(made) as core:

        def observe(plan: IterationPlan, result: SweepResult, seconds: float) -> None:
            nonlocal beside
            beside += bool(plan.migrations) and plan.copies_beside and bool(plan.batches)

        core.observe = observe
        answers = run(core, asked)
    assert beside > 0
    reference = reference_model(directories["llama"])
    for request in asked:
        tokens = answers.tokens[request.request_id, 0]
        assert tokens == greedy_tokens(reference, request.prompt_token_ids, 60)
