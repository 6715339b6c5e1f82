"""The engine on a CUDA device with a real cpu_service: the same greedy tokens as `transformers`.

In fp32, with TF32 off, tokens must be identical wherever a request ran; in bf16 they are held to
what `transformers` itself is off by in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.config import GpuServiceConfig
from gpu_service.engine.messages import Submit
from gpu_service.pipeline.cuda.inputs import SweepShape
from tests.support.engine import config, greedy, real_core, run
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
        "gpu_kv_blocks": 5,
        "max_batch_tokens": 17,
    },
}
WAYS = [
    (transport, how)
    for transport in TRANSPORTS
    for how in HOW
    if transport == "shm" or "offload_mode" not in HOW[how]
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
    return config(
        directory,
        device="cuda",
        dtype=dtype,
        cpu_services=(service.address,),
        host_kv_gib=0.01,
        sweep_deadline_ms=30_000,
        # Few graphs to capture: each test starts an engine.
        max_running_requests=8,
        **changes,
    )


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
