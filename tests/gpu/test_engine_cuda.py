"""The engine on a CUDA device with a real cpu_service: the same greedy tokens as `transformers`.

fp32, with TF32 off, so that tokens must be identical wherever a request ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpu_service.engine.messages import Submit
from tests.support.engine import config, greedy, real_core, run
from tests.support.models import FAMILIES, greedy_tokens, reference_model, tiny_model_dir
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
}


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


def requests() -> list[Submit]:
    return [greedy(f"r{i}", prompt, OUTPUT) for i, prompt in enumerate(prompts())]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(
    directories: dict[str, Path], service: Service, family: str, transport: str, how: str
) -> None:
    made = config(
        directories[family],
        device="cuda",
        dtype="float32",
        cpu_services=(service.address,),
        offload_transport=transport,
        host_kv_gib=0.01,
        sweep_deadline_ms=30_000,
        **HOW[how],
    )
    with real_core(made) as core:
        answers = run(core, requests())
    reference = reference_model(directories[family])
    for i, prompt in enumerate(prompts()):
        assert answers.tokens[f"r{i}", 0] == greedy_tokens(reference, prompt, OUTPUT)
    host = sum(usage.host_tokens for usage in answers.usages.values())
    assert (host > 0) == (made.offload != "never")
