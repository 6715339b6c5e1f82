"""What runs on a CUDA device, in Triton's interpreter: the greedy tokens of `transformers`, drawn
ones equal to those of `--device cpu`, and the next sweep prepared before the last one was heard
of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Submit
from gpu_service.model.model import load_model
from tests.support.engine import config, greedy, local_core, run, triton_core
from tests.support.models import FAMILIES, greedy_tokens, reference_model, tiny_model_dir

OUTPUT = 5
LENGTHS = (1, 17, 30)
HOW: dict[str, dict[str, Any]] = {
    "never": {"offload": "never"},
    "never-chunked": {"offload": "never", "max_batch_tokens": 11},
    "small-gpu-pool": {"offload": "auto", "gpu_kv_blocks": 3, "max_batch_tokens": 64},
    "forced-3": {"offload": "auto", "force_migration_every": 3, "max_batch_tokens": 24},
}
DEFAULT = {
    ("llama", "never"),
    ("qwen3", "never-chunked"),
    ("mistral", "small-gpu-pool"),
    ("qwen2", "forced-3"),
}
# The interpreter takes seconds a case: a family for each way by default, all of them in the slow
# tier and on a CUDA device (tests/gpu).
CASES = [
    pytest.param(family, how, marks=[] if (family, how) in DEFAULT else [pytest.mark.slow])
    for family in FAMILIES
    for how in HOW
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model_dir(root / name, name, head_dim=16) for name in FAMILIES}


def prompts() -> list[list[int]]:
    return [[3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS]


def requests(**sampling: Any) -> list[Submit]:
    return [greedy(f"r{i}", prompt, OUTPUT, **sampling) for i, prompt in enumerate(prompts())]


def core(directory: Path, **changes: Any) -> EngineCore:
    made = config(directory, cpu_services=("local",), **changes)
    host_blocks = 0 if made.offload == "never" else 64
    return triton_core(made, load_model(directory, dtype="float32"), host_blocks=host_blocks)


def count_overlaps(made: EngineCore) -> list[int]:
    """Fills up with the number of pending tokens each time an iteration is decided."""
    seen: list[int] = []
    schedule = made.scheduler.schedule

    def counting(now: float) -> Any:
        seen.append(sum(choice.pending for choice in made.scheduler.state.running))
        return schedule(now)

    made.scheduler.schedule = counting  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(("family", "how"), CASES)
def test_tokens_are_those_of_transformers(
    directories: dict[str, Path], family: str, how: str
) -> None:
    made = core(directories[family], **HOW[how])
    pending = count_overlaps(made)
    answers = run(made, requests())
    reference = reference_model(directories[family])
    for i, prompt in enumerate(prompts()):
        assert answers.tokens[f"r{i}", 0] == greedy_tokens(reference, prompt, OUTPUT)
    host = sum(usage.host_tokens for usage in answers.usages.values())
    assert (host > 0) == (made.scheduler.limits.offload != "never")
    if how.startswith("never"):
        assert sum(count > 0 for count in pending) >= OUTPUT - 1


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "seed": 11},
        {"temperature": 1.3, "seed": 5, "top_p": 0.8, "top_k": 12, "min_p": 0.02},
        {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.4, "presence_penalty": 0.3},
        {"logit_bias": {17: 30.0}, "min_tokens": 3, "ignore_eos": False},
        {"logprobs": 3, "prompt_logprobs": 2},
    ],
    ids=["drawn", "filtered", "penalised", "biased", "logprobs"],
)
def test_draws_are_those_of_the_cpu_device(
    directories: dict[str, Path], sampling: dict[str, Any]
) -> None:
    directory = directories["llama"]
    asked = requests(**sampling)
    ours = run(core(directory, offload="never", max_batch_tokens=11), asked)
    plain = config(directory, offload="never", max_batch_tokens=11)
    theirs = run(local_core(plain, load_model(directory, dtype="float32")), asked)
    assert ours.tokens == theirs.tokens
    assert ours.finishes == theirs.finishes
    for key, listed in theirs.logprobs.items():
        assert [x.token_id for x in ours.logprobs[key]] == [x.token_id for x in listed]
        assert [x.logprob for x in ours.logprobs[key]] == pytest.approx(
            [x.logprob for x in listed], abs=1e-4
        )
    assert ours.prompts.keys() == theirs.prompts.keys()


def test_logits_that_are_not_finite_end_their_request_alone(directories: dict[str, Path]) -> None:
    made = core(directories["llama"], offload="never")
    model = made._runner._sweeps.model  # type: ignore[attr-defined]
    with torch.inference_mode():
        model.embedding[250] = float("nan")
    bad = greedy("bad", [5, 6, 250], OUTPUT)
    good = greedy("good", prompts()[2], OUTPUT)
    answers = run(made, [bad, good])
    assert answers.refusals["bad"].reason == "NUMERICAL"
    reference = reference_model(directories["llama"])
    assert answers.tokens["good", 0] == greedy_tokens(reference, prompts()[2], OUTPUT)


def test_running_out_of_memory_ends_one_request(directories: dict[str, Path]) -> None:
    made = core(directories["llama"], offload="never", max_batch_tokens=64)
    forward = made._runner._sweeps.forward  # type: ignore[attr-defined]
    run_sweep, failures = forward.run, []

    def short_of_memory(shape: Any, longest: int) -> None:
        if longest == LENGTHS[2]:
            failures.append(shape)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        run_sweep(shape, longest)

    forward.run = short_of_memory
    answers = run(made, [greedy("old", prompts()[0], OUTPUT), greedy("big", prompts()[2], OUTPUT)])
    assert len(failures) == 1
    assert {r: x.reason for r, x in answers.refusals.items()} == {"big": "OUT_OF_MEMORY"}
    reference = reference_model(directories["llama"])
    assert answers.tokens["old", 0] == greedy_tokens(reference, prompts()[0], OUTPUT)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["slots", "positions", "sources", "samples"])
def test_wrong_inputs_show_in_the_tokens(directories: dict[str, Path], mutant: str) -> None:
    made = core(directories["llama"], offload="never", max_batch_tokens=11)
    inputs = made._runner._sweeps.inputs  # type: ignore[attr-defined]
    send = inputs.send

    def spoiled(*arguments: Any) -> Any:
        found = send(*arguments)
        getattr(inputs, mutant).copy_(getattr(inputs, mutant).roll(1))
        return found

    inputs.send = spoiled
    answers = run(made, requests())
    reference = reference_model(directories["llama"])
    wanted = [greedy_tokens(reference, prompt, OUTPUT) for prompt in prompts()]
    got = [answers.tokens.get((f"r{i}", 0)) for i in range(len(LENGTHS))]
    assert got != wanted
