"""Drawn tokens on a CUDA device, in graphs and ahead of results, against those of the CPU device.

fp32, with TF32 off, so that tokens must be identical.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.engine.messages import Submit
from gpu_service.model.model import load_model
from gpu_service.pipeline.cuda.graphs import SweepGraphs
from tests.support import mixed_sampling as mixed
from tests.support.engine import Answers, config, greedy, local_core, real_core, run
from tests.support.models import tiny_model_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

OUTPUT = 70
HOW: dict[str, dict[str, Any]] = {
    "graphs": {},
    "chunked": {"max_batch_tokens": 9},
    # 75 to 99 tokens each, in blocks of 16.
    "short of blocks": {"gpu_kv_blocks": 14},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", head_dim=16)


def on_cpu(directory: Path, asked: list[Submit]) -> Answers:
    made = config(directory)
    return run(local_core(made, load_model(directory, dtype="float32")), asked)


def on_cuda(directory: Path, asked: list[Submit], preempt_every: int = 0, **how: Any) -> mixed.Run:
    made = config(directory, device="cuda", max_running_requests=16, **how)
    with real_core(made) as core:
        return mixed.run_mixed(core, asked, preempt_every=preempt_every)


@pytest.mark.parametrize("how", HOW)
def test_rows_of_all_kinds_in_one_batch(directory: Path, how: str) -> None:
    asked = mixed.requests(mixed.SAMPLINGS, OUTPUT)
    made = on_cuda(directory, asked, **HOW[how])
    mixed.assert_same(made.answers, on_cpu(directory, asked))
    assert made.looked_ahead >= OUTPUT - 1
    recomputed = sum(usage.recomputations for usage in made.answers.usages.values())
    assert (recomputed > 0) == (how == "short of blocks")


@pytest.mark.parametrize("preempt_every", [2, 3, 5])
def test_choices_that_begin_anew_while_a_token_is_pending(
    directory: Path, preempt_every: int
) -> None:
    asked = mixed.requests(mixed.SAMPLINGS, OUTPUT)
    made = on_cuda(directory, asked, preempt_every)
    mixed.assert_same(made.answers, on_cpu(directory, asked))
    assert made.preempted > 5


def test_waiting_for_each_result_changes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that the device does not draw for holds back the others' look-ahead."""
    asked = mixed.requests(mixed.SAMPLINGS, OUTPUT)
    asked.append(greedy("waited for", [5, 6, 7], OUTPUT + 9, temperature=1.0, logprobs=21))
    made = on_cuda(directory, asked)
    mixed.assert_same(made.answers, on_cpu(directory, asked))
    assert made.looked_ahead == 0
    monkeypatch.setattr(SweepGraphs, "replay", lambda *_: False)
    eager = on_cuda(directory, asked[:-1])
    assert eager.looked_ahead >= OUTPUT - 1
    assert eager.answers.tokens == {
        key: tokens for key, tokens in made.answers.tokens.items() if key[0] != "waited for"
    }


def test_logits_that_are_not_finite_end_their_request_alone(directory: Path) -> None:
    asked = mixed.requests(["penalised", "listed"], OUTPUT)
    theirs = on_cpu(directory, asked)
    said = {t for tokens in theirs.tokens.values() for t in tokens}
    said.update(t for request in asked for t in request.prompt_token_ids)
    poison = next(token for token in range(250) if token not in said)
    spec = {"temperature": 1.0, "frequency_penalty": 1.0, "logprobs": 1}
    with real_core(config(directory, device="cuda", max_running_requests=4)) as core:
        model = core._runner._sweeps.model  # type: ignore[attr-defined]
        with torch.inference_mode():
            model.embedding[poison] = float("nan")
        answers = run(core, [greedy("bad", [5, 6, poison], OUTPUT, **spec), *asked])
    assert answers.refusals["bad"].reason == "NUMERICAL"
    for key, tokens in theirs.tokens.items():
        assert answers.tokens[key] == tokens
