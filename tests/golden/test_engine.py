"""The engine's greedy tokens against `transformers`: every family, tier, transport and chunking.

In fp32 they must be the same tokens wherever a request ran and however often it moved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from gpu_service.engine.messages import Submit, TokenLogprob
from gpu_service.model.model import CausalLM, load_model
from gpu_service.scheduling.plan import Mode
from tests.support.engine import config, greedy, local_core, real_core, run
from tests.support.models import FAMILIES, VARIANTS, greedy_tokens, reference_model, tiny_model_dir
from tests.support.numerics import check_teacher_forced
from tests.support.offload import TRANSPORTS, cpu_service
from tests.support.stack import Service

OUTPUT = 24
LENGTHS = (1, 15, 16, 17, 61)
"""Prompts round a block's boundary, and one longer than every sliding window."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    # The host tier's kernels want head sizes that are multiples of 16.
    return {name: tiny_model_dir(root / name, name, head_dim=16) for name in VARIANTS}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with cpu_service(tmp_path_factory.mktemp("cpu")) as running:
        yield running


def prompts() -> list[list[int]]:
    return [[3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS]


@cache
def expected(directory: Path) -> list[list[int]]:
    reference = reference_model(directory)
    return [greedy_tokens(reference, prompt, OUTPUT) for prompt in prompts()]


@cache
def loaded(directory: Path) -> CausalLM:
    return load_model(directory, dtype="float32")


def requests() -> list[Submit]:
    return [greedy(f"r{i}", prompt, OUTPUT) for i, prompt in enumerate(prompts())]


HOW = {
    "never": {"offload": "never"},
    "never-chunked": {"offload": "never", "max_batch_tokens": 7},
    "always": {"offload": "always"},
    "always-chunked": {"offload": "always", "max_batch_tokens": 7},
    "small-gpu-pool": {"offload": "auto", "gpu_kv_blocks": 8},
    "forced-1": {"offload": "auto", "force_migration_every": 1},
    "forced-3-chunked": {"offload": "auto", "force_migration_every": 3, "max_batch_tokens": 9},
    "always-deferred": {"offload": "always", "offload_mode": "deferred"},
    "small-gpu-pool-deferred": {
        "offload": "auto",
        "offload_mode": "deferred",
        "gpu_kv_blocks": 8,
        "max_batch_tokens": 7,
    },
    "forced-1-deferred": {
        "offload": "auto",
        "offload_mode": "deferred",
        "force_migration_every": 1,
    },
    "always-asymmetric": {"offload": "always", "offload_mode": "asymmetric"},
    "small-gpu-pool-asymmetric": {
        "offload": "auto",
        "offload_mode": "asymmetric",
        "gpu_kv_blocks": 8,
        "max_batch_tokens": 7,
    },
    "forced-1-asymmetric": {
        "offload": "auto",
        "offload_mode": "asymmetric",
        "force_migration_every": 1,
    },
    "forced-3-chunked-asymmetric": {
        "offload": "auto",
        "offload_mode": "asymmetric",
        "force_migration_every": 3,
        "max_batch_tokens": 9,
    },
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_of_transformers(
    directories: dict[str, Path], variant: str, how: str
) -> None:
    directory = directories[variant]
    made = config(directory, cpu_services=("local",), **HOW[how])
    host_blocks = 0 if made.offload == "never" else 64
    core = local_core(made, loaded(directory), host_blocks=host_blocks)
    modes: set[Mode] = set()
    core.observe = lambda plan, result, seconds: modes.add(plan.mode)
    answers = run(core, requests())
    for i, tokens in enumerate(expected(directory)):
        assert answers.tokens[f"r{i}", 0] == tokens, f"prompt of {LENGTHS[i]} tokens"
    usages = answers.usages.values()
    host = sum(u.host_tokens for u in usages)
    moved = sum(u.demotions + u.promotions for u in usages)
    if how.startswith("always"):
        assert host == OUTPUT * len(LENGTHS)
    elif how.startswith("forced"):
        assert moved >= len(LENGTHS)
    assert (host > 0) == (made.offload != "never")
    assert modes <= {Mode.INLINE, Mode(made.offload_mode)}
    assert Mode(made.offload_mode) in modes


REAL = ("always", "always-chunked", "forced-1", "small-gpu-pool")
DEFERRED = tuple(how for how in HOW if how.endswith("deferred"))
ASYMMETRIC = tuple(how for how in HOW if how.endswith("asymmetric"))


@pytest.mark.parametrize(
    ("transport", "how"),
    [
        *itertools.product(TRANSPORTS, (*REAL, *ASYMMETRIC)),
        *itertools.product(["shm"], DEFERRED),
    ],
)
def test_a_real_cpu_service_gives_the_same_tokens(
    directories: dict[str, Path], service: Service, transport: str, how: str
) -> None:
    directory = directories["mistral"]
    made = config(
        directory,
        cpu_services=(service.address,),
        offload_transport=transport,
        host_kv_gib=0.01,
        sweep_deadline_ms=30_000,
        **HOW[how],
    )
    with real_core(made) as core:
        answers = run(core, requests())
    for i, tokens in enumerate(expected(directory)):
        assert answers.tokens[f"r{i}", 0] == tokens
    assert sum(u.host_tokens for u in answers.usages.values()) > 0


@pytest.mark.parametrize(
    "how", ["never", "always-chunked", "forced-1", "forced-1-deferred", "forced-1-asymmetric"]
)
@pytest.mark.parametrize("variant", FAMILIES)
def test_bf16_stays_within_the_calibrated_bound(
    directories: dict[str, Path], variant: str, how: str
) -> None:
    directory = directories[variant]
    made = config(directory, cpu_services=("local",), dtype="bfloat16", **HOW[how])
    model = load_model(directory, dtype="bfloat16")
    core = local_core(made, model, host_blocks=0 if how == "never" else 64)
    answers = run(core, [greedy(f"r{i}", p, OUTPUT, logprobs=0) for i, p in enumerate(prompts())])
    keys = [(f"r{i}", 0) for i in range(len(LENGTHS))]
    said = [answers.tokens[key] for key in keys]
    listed = [answers.logprobs[key] for key in keys]
    references = reference_model(directory), reference_model(directory, torch.bfloat16)
    check_teacher_forced(*references, prompts(), said, listed)
    if how == "never":  # the check itself can fail
        shifted = [[_shifted(entry) for entry in row] for row in listed]
        with pytest.raises(AssertionError):
            check_teacher_forced(*references, prompts(), said, shifted)


def _shifted(entry: TokenLogprob) -> TokenLogprob:
    return TokenLogprob(entry.token_id, entry.logprob - 1.0, entry.rank, entry.top)
