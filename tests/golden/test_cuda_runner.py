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
from tests.support import mixed_sampling as mixed
from tests.support.engine import Answers, config, greedy, local_core, run, triton_core
from tests.support.models import FAMILIES, greedy_tokens, reference_model

OUTPUT = 5
LENGTHS = (1, 17, 30)
HOW: dict[str, dict[str, Any]] = {
    "never": {"offload": "never"},
    "never-chunked": {"offload": "never", "max_batch_tokens": 11},
    "small-gpu-pool": {"offload": "auto", "gpu_kv_blocks": 3, "max_batch_tokens": 64},
    "forced-3": {"offload": "auto", "force_migration_every": 3, "max_batch_tokens": 24},
    # As without shared memory: the engine's thread submits and waits.
    "forced-2-asymmetric": {
        "offload": "auto",
        "offload_mode": "asymmetric",
        "force_migration_every": 2,
        "max_batch_tokens": 24,
    },
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


def prompts() -> list[list[int]]:
    return [[3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS]


def requests() -> list[Submit]:
    return [greedy(f"r{i}", prompt, OUTPUT) for i, prompt in enumerate(prompts())]


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


def run_on_cpu(directory: Path, asked: list[Submit]) -> Answers:
    plain = config(directory, offload="never")
    return run(local_core(plain, load_model(directory, dtype="float32")), asked)


@pytest.mark.parametrize(
    ("how", "preempt_every"),
    [
        ({"offload": "never", "max_batch_tokens": 11}, 0),
        pytest.param({"offload": "never", "max_batch_tokens": 64}, 3, marks=pytest.mark.slow),
        ({"offload": "auto", "force_migration_every": 3, "max_batch_tokens": 64}, 0),
    ],
    ids=["chunked", "preempted", "migrated"],
)
def test_draws_are_those_of_the_cpu_device(
    directories: dict[str, Path], how: dict[str, Any], preempt_every: int
) -> None:
    """Rows of all kinds in one batch, deciding ahead of what they draw."""
    asked = mixed.requests(mixed.SAMPLINGS, OUTPUT)
    made = mixed.run_mixed(core(directories["llama"], **how), asked, preempt_every=preempt_every)
    mixed.assert_same(made.answers, run_on_cpu(directories["llama"], asked))
    assert made.looked_ahead >= (OUTPUT - 1 if how["offload"] == "never" else 1)
    assert (made.preempted > 1) == (preempt_every > 0)


def test_what_the_device_does_not_draw_is_waited_for(directories: dict[str, Path]) -> None:
    listed = greedy("listed", prompts()[1], OUTPUT, temperature=1.0, logprobs=21)
    asked = [listed, *mixed.requests(["penalised"], OUTPUT)]
    made = mixed.run_mixed(core(directories["llama"], offload="never"), asked)
    mixed.assert_same(made.answers, run_on_cpu(directories["llama"], asked))
    assert len(made.answers.logprobs["listed", 0][0].top) == 21
    assert made.looked_ahead == 0


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
