"""SmolLM2-135M through the engine on real prompts, all at once, against `transformers` one by one.

The default tier runs three short prompts, the slow tier all twenty of 10 to 1,500 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from gpu_service.model.tokenizer import load_tokenizer
from tests.support.engine import Answers, config, greedy, real_core, run
from tests.support.models import greedy_tokens
from tests.support.numerics import check_teacher_forced
from tests.support.offload import cpu_service
from tests.support.prompts import LENGTHS, real_prompts
from tests.support.smollm2 import smollm2_reference
from tests.support.stack import Service

NEW_TOKENS = 16
FEW = (0, 2, 5)
HOW: dict[str, dict[str, Any]] = {
    "never": {"offload": "never"},
    "never-chunked": {"offload": "never", "max_batch_tokens": 100},
    "shm": {"offload": "always"},
    "shm-chunked": {"offload": "always", "max_batch_tokens": 100},
    "shm-forced": {"offload": "auto", "force_migration_every": 2},
    "grpc-forced": {
        "offload": "auto",
        "force_migration_every": 2,
        "offload_transport": "grpc",
        "max_batch_tokens": 200,
    },
}
DEFAULT = ("shm-forced",)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with cpu_service(tmp_path_factory.mktemp("cpu")) as running:
        yield running


@cache
def prompts() -> list[list[int]]:
    return real_prompts(load_tokenizer("smollm2"))


@cache
def expected(index: int) -> list[int]:
    return greedy_tokens(smollm2_reference(), prompts()[index], NEW_TOKENS)


def answers_of(service: Service, how: str, dtype: str, chosen: list[int]) -> Answers:
    made = config(
        "smollm2",
        dtype=dtype,
        gpu_kv_blocks=600,
        host_kv_gib=0.5,
        cpu_services=(service.address,),
        sweep_deadline_ms=60_000,
        **HOW[how],
    )
    requests = [greedy(f"r{i}", prompts()[i], NEW_TOKENS, logprobs=0) for i in chosen]
    with real_core(made) as core:
        return run(core, requests)


def few_or_slow() -> list[object]:
    """Some ways with few prompts by default; every way with every prompt in the slow tier."""
    every = list(range(len(LENGTHS)))
    few = [pytest.param(how, list(FEW), id=f"{how}-few") for how in DEFAULT]
    slow = pytest.mark.slow
    return [*few, *(pytest.param(how, every, id=f"{how}-all", marks=slow) for how in HOW)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("how", "chosen"), few_or_slow())
def test_fp32_tokens(service: Service, how: str, chosen: list[int]) -> None:
    answers = answers_of(service, how, "float32", chosen)
    for index in chosen:
        assert answers.tokens[f"r{index}", 0] == expected(index), f"prompt {index}"
    assert (sum(u.host_tokens for u in answers.usages.values()) > 0) == (how[:5] != "never")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("how", "chosen"), few_or_slow())
def test_bf16_logits_and_tokens(service: Service, how: str, chosen: list[int]) -> None:
    answers = answers_of(service, how, "bfloat16", chosen)
    references = smollm2_reference(), smollm2_reference(torch.bfloat16)
    check_teacher_forced(
        *references,
        [prompts()[i] for i in chosen],
        [answers.tokens[f"r{i}", 0] for i in chosen],
        [answers.logprobs[f"r{i}", 0] for i in chosen],
    )
