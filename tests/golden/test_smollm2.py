"""SmolLM2-135M on real prompts: logits and greedy tokens against `transformers`."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from gpu_service.model.model import CausalLM, load_model
from gpu_service.model.spec import resolve_model
from gpu_service.model.tokenizer import load_tokenizer
from tests.support import gguf_models, models
from tests.support.prompts import LENGTHS, real_prompts
from tests.support.smollm2 import smollm2_reference

FEW = (0, 7)
NEW_TOKENS = 16


@lru_cache(maxsize=2)
def model(dtype: str) -> CausalLM:
    return load_model("smollm2", dtype=dtype)


@lru_cache(maxsize=1)
def prompts() -> list[list[int]]:
    return real_prompts(load_tokenizer("smollm2"))


def few_or_slow() -> list[object]:
    """Two prompts by default, all twenty in the slow tier."""
    slow = pytest.mark.slow
    return [i if i in FEW else pytest.param(i, marks=slow) for i in range(len(LENGTHS))]


@pytest.mark.parametrize("index", few_or_slow())
def test_fp32(index: int) -> None:
    """All logits of the prompt, and the same greedy tokens after it."""
    reference, prompt = smollm2_reference(), prompts()[index]
    continuation = models.greedy_tokens(reference, prompt, NEW_TOKENS)
    whole = prompt + continuation
    ours, theirs = (
        models.dense_logits(model("float32"), whole),
        models.reference_logits(reference, whole),
    )
    assert (ours - theirs).abs().max() / theirs.abs().max() < 5e-5
    assert ours[len(prompt) - 1 : -1].argmax(-1).tolist() == continuation


@pytest.mark.parametrize("index", few_or_slow())
def test_bf16(index: int) -> None:
    """At most twice as far from fp32 as `transformers` in bf16, and the same clear choices."""
    prompt = prompts()[index]
    exact = models.reference_logits(smollm2_reference(), prompt)
    theirs = models.reference_logits(smollm2_reference(torch.bfloat16), prompt)
    ours = models.dense_logits(model("bfloat16"), prompt)
    our_error, their_error = (ours - exact).abs(), (theirs - exact).abs()
    assert our_error.mean() <= 2 * their_error.mean()
    assert our_error.max() <= 2 * their_error.max()
    best = exact.topk(2, dim=-1).values
    clear = (best[:, 0] - best[:, 1]) > 2 * their_error.amax(dim=-1).mean()
    assert clear.any()
    assert torch.equal(ours.argmax(-1)[clear], exact.argmax(-1)[clear])


@pytest.mark.slow
def test_weights_are_those_that_transformers_reads() -> None:
    theirs = gguf_models.reference_from_gguf(resolve_model("smollm2")).state_dict()
    ours = smollm2_reference().state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
