"""Logits and greedy tokens of the model alone against `transformers`, for every family and variant.

The bound in 16 bits calibrates itself: against the fp32 oracle we may be at most twice as wrong as
`transformers` is in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpu_service.model import rope
from gpu_service.model.model import CausalLM, load_model
from tests.support import models

PROMPT_TOKENS = 90  # past every window, and past the original context of llama3 scaling
FP32_BOUND = 5e-5


@pytest.fixture(scope="module", params=list(models.VARIANTS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_model_dir(tmp_path_factory.mktemp("model"), request.param)


def prompt(seed: int = 0, tokens: int = PROMPT_TOKENS) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, models.VOCAB, (tokens,), generator=generator).tolist()


def fp32_error(model: CausalLM, reference: object, token_ids: list[int]) -> float:
    ours = models.dense_logits(model, token_ids)
    theirs = models.reference_logits(reference, token_ids)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_logits_in_fp32(directory: Path) -> None:
    model = load_model(directory, dtype="float32")
    assert fp32_error(model, models.reference_model(directory), prompt()) < FP32_BOUND


def test_greedy_tokens_in_fp32(directory: Path) -> None:
    model = load_model(directory, dtype="float32")
    expected = models.greedy_tokens(models.reference_model(directory), prompt(), 24)
    tokens = prompt()
    for token in expected:
        assert int(models.dense_logits(model, tokens)[-1].argmax()) == token
        tokens.append(token)


def test_logits_in_bf16(directory: Path) -> None:
    exact = models.reference_logits(models.reference_model(directory), prompt())
    theirs = models.reference_logits(models.reference_model(directory, torch.bfloat16), prompt())
    ours = models.dense_logits(load_model(directory, dtype="bfloat16"), prompt())
    our_error, their_error = (ours - exact).abs(), (theirs - exact).abs()
    assert our_error.mean() <= 2 * their_error.mean()
    assert our_error.max() <= 2 * their_error.max()
    # Where the oracle's first choice is clear by a typical row's worst error, ours is the same.
    best = exact.topk(2, dim=-1).values
    clear = (best[:, 0] - best[:, 1]) > 2 * their_error.amax(dim=-1).mean()
    assert clear.sum() >= 10
    assert torch.equal(ours.argmax(-1)[clear], exact.argmax(-1)[clear])


def test_rows_are_independent(directory: Path) -> None:
    """Any row may be computed with any others, in any order: what continuous batching relies on."""
    model = load_model(directory, dtype="float32")
    ids = torch.tensor(prompt())
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(len(ids))
    q, k, v = model.pre_projection(1, model.embed(ids), positions)
    shuffled = model.pre_projection(1, model.embed(ids[order]), positions[order])
    for whole, part in zip((q, k, v), shuffled, strict=True):
        assert part.is_contiguous()
        torch.testing.assert_close(part, whole[order], rtol=1e-5, atol=1e-5)
    state = model.post_projection(1, model.embed(ids), q)
    some = model.logits(state, order[:7])
    assert (some.dtype, some.shape) == (torch.float32, (7, models.VOCAB))
    torch.testing.assert_close(some, model.logits(state)[order[:7]], rtol=1e-5, atol=1e-5)
    assert model.logits(state, order[:0]).shape == (0, models.VOCAB)


# Each mutant must break the fp32 test for the variant that exercises it.
MUTANTS: dict[str, tuple[str, Callable[[CausalLM], None]]] = {
    # (Shifting all positions changes nothing: only distances count.)
    "later positions one too far": (
        "llama",
        lambda m: m.rope[45:].copy_(m.rope[45:].roll(-1, 0)),
    ),
    "rope turns backwards": ("llama", lambda m: m.rope[:, 1].neg_()),
    "no output bias": ("llama-bias-headdim", lambda m: m.layers[2].output._bias.zero_()),
    "no qkv bias": ("qwen2", lambda m: m.layers[0].qkv._bias.zero_()),
    "q and k norms swapped": (
        "qwen3",
        lambda m: m.layers[1].qk_norm.copy_(m.layers[1].qk_norm.roll(2, 0)),
    ),
    "norms swapped": (
        "mistral",
        lambda m: m.layers[0].input_norm.copy_(m.layers[0].post_norm.clone()),
    ),
    "no final norm": ("mistral-full", lambda m: m.final_norm.fill_(1.0)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name: str, tmp_path: Path) -> None:
    variant, mutate = MUTANTS[name]
    directory = models.tiny_model_dir(tmp_path, variant)
    model = load_model(directory, dtype="float32")
    with torch.inference_mode():
        mutate(model)
    assert fp32_error(model, models.reference_model(directory), prompt()) > 20 * FP32_BOUND


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("mistral", {"sliding_window": 25}),
        ("qwen2-window", {"max_window_layers": 2}),
        ("llama", {"rope_scaling": None}),
        ("qwen2-yarn", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("llama-linear-tied", {"rope_scaling": None}),
        ("llama2", {"rms_norm_eps": 1e-2}),
    ],
)
def test_wrong_config_fails(variant: str, change: dict[str, object], tmp_path: Path) -> None:
    """The same weights with a slightly wrong config are told apart."""
    right = models.tiny_model_dir(tmp_path / "right", variant)
    wrong = models.tiny_model_dir(tmp_path / "wrong", variant, **change)
    model = load_model(wrong, dtype="float32")
    assert fp32_error(model, models.reference_model(right), prompt()) > 20 * FP32_BOUND


@pytest.mark.parametrize("variant", ["llama", "qwen2-yarn", "llama-linear-tied"])
def test_rope_frequencies_equal_transformers(variant: str, tmp_path: Path) -> None:
    directory = models.tiny_model_dir(tmp_path, variant)
    model = load_model(directory, dtype="float32")
    theirs = models.reference_model(directory).model.rotary_emb
    ours = rope.inverse_frequencies(model.spec.rope, model.spec.head_dim)
    assert torch.equal(ours, theirs.inv_freq)
    assert model.spec.rope.attention_factor == pytest.approx(theirs.attention_scaling, abs=1e-12)
