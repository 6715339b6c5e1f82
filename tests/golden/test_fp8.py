"""The engine with fp8 weights, on the CPU device and as on a CUDA device in Triton's interpreter,
against a `transformers` model that is quantised by the book."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.engine.core import EngineCore
from gpu_service.model.model import load_model
from tests.support.engine import config, greedy, local_core, run, triton_core
from tests.support.fp8 import fp8_reference
from tests.support.models import tiny_model_dir
from tests.support.numerics import check_teacher_forced

LENGTHS = (1, 17, 30)


def check(core: EngineCore, directory: Path, output: int) -> None:
    prompts = [[3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS]
    answers = run(
        core, [greedy(f"r{i}", prompt, output, logprobs=0) for i, prompt in enumerate(prompts)]
    )
    check_teacher_forced(
        fp8_reference(directory),
        fp8_reference(directory, torch.bfloat16),
        prompts,
        [answers.tokens[f"r{i}", 0] for i in range(len(LENGTHS))],
        [answers.logprobs[f"r{i}", 0] for i in range(len(LENGTHS))],
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("how", [{}, {"force_migration_every": 3, "offload": "auto"}])
def test_cpu_device(family: str, dtype: str, how: dict[str, Any], tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path, family, head_dim=16)
    services = ("local",) if how else ()
    made = config(directory, max_batch_tokens=24, cpu_services=services, **how)
    model = load_model(directory, dtype=dtype, quantization="fp8")
    check(local_core(made, model, host_blocks=64 if how else 0), directory, 16)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_as_on_a_cuda_device(family: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    directory = tiny_model_dir(tmp_path, family, head_dim=16)
    made = config(directory, max_batch_tokens=64)
    check(triton_core(made, load_model(directory, quantization="fp8")), directory, 5)
