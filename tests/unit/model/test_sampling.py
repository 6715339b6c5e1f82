"""The sampler against a slow reference, row by row, and against the distributions it promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service.engine.messages import SamplingSpec
from gpu_service.model import sampling
from gpu_service.model.draws import uniform
from gpu_service.model.sampling import Sampler, SamplingRow

VOCAB = 40
EOS = 3
NEVER = float("-inf")


def row(
    *, prompt: Sequence[int] = (), output: Sequence[int] = (), choice: int = 0, **spec: Any
) -> SamplingRow:
    return SamplingRow(SamplingSpec(max_tokens=99, **spec), prompt, output, choice)


def logits_for(rows: int, seed: int = 0, vocab: int = VOCAB, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def reference_draw(seed: int, position: int) -> float:
    """splitmix64 in Python's integers."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    z = mix((mix(seed % 2**64) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64)
    return ((z >> 16) + 0.5) / 2**48


def reference_token(logits: Sequence[float], wish: SamplingRow) -> int:
    """What the sampler's docstring says, one token at a time, in fp64."""
    spec, values = wish.spec, list(logits)
    for token in set(wish.prompt_token_ids) | set(wish.output_token_ids):
        factor = spec.repetition_penalty
        values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
    for token in set(wish.output_token_ids):
        count = list(wish.output_token_ids).count(token)
        values[token] -= spec.frequency_penalty * count + spec.presence_penalty
    for token, bias in spec.logit_bias.items():
        values[token] += bias
    if len(wish.output_token_ids) < spec.min_tokens:
        for token in (EOS, *spec.stop_token_ids):
            values[token] = NEVER
    best = max(values)
    if spec.temperature == 0:
        return values.index(best)
    scaled = [(v - best) / spec.temperature for v in values]
    kept = sorted(scaled, reverse=True)
    floor = kept[spec.top_k - 1] if 0 < spec.top_k < len(kept) else NEVER
    weights = [math.exp(v) if v >= floor else 0.0 for v in kept]
    if spec.top_p < 1:
        running, total = 0.0, sum(weights)
        for value, weight in zip(kept, weights, strict=True):
            running += weight
            if running >= spec.top_p * total:
                floor = max(floor, value)
                break
    if spec.min_p > 0:
        floor = max(floor, math.log(spec.min_p))
    weights = [math.exp(v) if v >= floor else 0.0 for v in scaled]
    position = len(wish.output_token_ids)
    target = reference_draw(spec.seed + wish.choice_index, position) * sum(weights)
    running = 0.0
    for token, weight in enumerate(weights):
        running += weight
        if running > target:
            return token
    raise AssertionError("the draw lies past the distribution")


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)
specs = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 0, 1, 5, 39, 40, 1000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.7, -0.5]),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCAB - 1), st.floats(-8, 8, width=32), max_size=3
        ),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.sampled_from([(), (5,), (1, 2)]),
        "seed": st.integers(0, 2**64 - 1),
    }
)
wishes = st.builds(
    lambda spec, prompt, output, choice: row(prompt=prompt, output=output, choice=choice, **spec),
    specs,
    tokens,
    tokens,
    st.integers(0, 15),
)


@given(st.lists(wishes, min_size=1, max_size=6), st.integers(0, 2**31))
# Derandomised: fp32 may round a draw at the edge of a token to the other side, once in a million.
@settings(max_examples=120, deadline=None, derandomize=True)
def test_any_batch_equals_the_reference(rows: list[SamplingRow], seed: int) -> None:
    logits = logits_for(len(rows), seed)
    before = logits.clone()
    sampled = Sampler([EOS]).sample(logits, rows)
    expected = [
        reference_token(values, wish) for values, wish in zip(logits.tolist(), rows, strict=True)
    ]
    assert sampled.token_ids.tolist() == expected
    assert sampled.failed_rows() == []
    assert torch.equal(logits, before)


@given(st.lists(wishes, min_size=2, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_neighbours_and_order_change_nothing(rows: list[SamplingRow], draw: Any) -> None:
    logits = logits_for(len(rows), 1)
    whole = Sampler([EOS]).sample(logits, rows).token_ids.tolist()
    order = draw.sample(range(len(rows)), len(rows))
    shuffled = Sampler([EOS]).sample(logits[order], [rows[i] for i in order]).token_ids.tolist()
    assert shuffled == [whole[i] for i in order]
    alone = [Sampler([EOS]).sample(logits[i : i + 1], [rows[i]]) for i in range(len(rows))]
    assert [int(s.token_ids) for s in alone] == whole


def test_large_vocabularies_need_more_candidates() -> None:
    """Nuclei beyond the first 256 candidates, beside rows that need few."""
    logits = logits_for(4, 5, vocab=30_000, scale=1.0)
    logits[1] *= 8
    rows = [
        row(top_p=p, top_k=k, seed=s)
        for p, k, s in [(0.99, 0, 1), (0.9, 0, 2), (0.5, 5000, 3), (0.9999, 0, 4)]
    ]
    whole = Sampler([EOS]).sample(logits, rows).token_ids.tolist()
    assert whole == [reference_token(v, r) for v, r in zip(logits.tolist(), rows, strict=True)]
    alone = [int(Sampler([EOS]).sample(logits[i : i + 1], [rows[i]]).token_ids) for i in range(4)]
    assert alone == whole


def drawn_counts(logits: torch.Tensor, draws: int, **spec: Any) -> torch.Tensor:
    """How often each token comes in independent draws (consecutive positions and seeds)."""
    rows = [row(seed=i % 7, output=[0] * (i // 7), **spec) for i in range(draws)]
    found = Sampler([EOS]).sample(logits.expand(draws, -1).contiguous(), rows)
    return torch.bincount(found.token_ids, minlength=logits.shape[-1]).double()


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Standardised: about N(0, 1) where the counts follow the probabilities."""
    expected = counts.sum() * probabilities
    likely = expected > 5
    assert counts[probabilities == 0].sum() == 0
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = int(likely.sum()) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


DISTRIBUTIONS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "plain": ({}, lambda x: x.softmax(-1)),
    "hot": ({"temperature": 2.0}, lambda x: (x / 2).softmax(-1)),
    "cold": ({"temperature": 0.5}, lambda x: (x * 2).softmax(-1)),
    "top-k": ({"top_k": 5}, lambda x: x.where(x >= x.topk(5).values[-1], NEVER).softmax(-1)),
    "min-p": (
        {"min_p": 0.2},
        lambda x: x.where(x.softmax(-1) >= 0.2 * x.softmax(-1).max(), NEVER).softmax(-1),
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_the_distribution(name: str) -> None:
    spec, distribution = DISTRIBUTIONS[name]
    logits = logits_for(1, 3)[0]
    counts = drawn_counts(logits, 4000, **spec)
    assert abs(chi_square(counts, distribution(logits.double()))) < 3


def test_wrong_temperature_fails_the_distribution_test() -> None:
    logits = logits_for(1, 3)[0]
    counts = drawn_counts(logits, 4000, temperature=1.1)
    assert chi_square(counts, logits.double().softmax(-1)) > 3


def test_uniform_draws() -> None:
    """Even over (0, 1) along seeds and along positions, and each as Python's integers say."""
    count = 20_000
    many, one = torch.arange(count), torch.full((count,), 12345)
    for seeds, positions in ((many, one), (one, many), (-many, one), (many, many)):
        draws = uniform(seeds, positions)
        bins = torch.bincount((draws * 50).long(), minlength=50).double()
        assert abs(chi_square(bins, torch.full((50,), 0.02).double())) < 3
        serial = torch.corrcoef(torch.stack((draws[1:], draws[:-1])))[0, 1]
        assert abs(serial) < 4 / math.sqrt(count)
        for i in (0, 1, 19_999):
            assert float(draws[i]) == reference_draw(int(seeds[i]), int(positions[i]))
    extremes = uniform(torch.tensor([-(2**63), 2**63 - 1, 0, -1]), torch.tensor([0, 2**31, 0, 0]))
    assert ((extremes > 0) & (extremes < 1)).all()


def test_choices_of_a_request_draw_apart() -> None:
    logits = torch.zeros(8, VOCAB)
    rows = [row(seed=2**64 - 4, choice=i, n=8) for i in range(8)]
    found = Sampler([EOS]).sample(logits, rows).token_ids.tolist()
    assert len(set(found)) > 4
    # Choice i of seed s is choice 0 of seed s + i, past 2^64 too.
    later = [row(seed=(2**64 - 4 + i) % 2**64) for i in range(8)]
    assert Sampler([EOS]).sample(logits, later).token_ids.tolist() == found


BROKEN = {
    "nan": lambda x: x[1].__setitem__(7, float("nan")),
    "inf": lambda x: x[1].__setitem__(7, float("inf")),
    "nothing left": lambda x: x[1].fill_(NEVER),
    "all nan": lambda x: x[1].fill_(float("nan")),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize(
    "spec", [{"temperature": 0.0}, {}, {"top_p": 0.9, "top_k": 8}, {"min_p": 0.1}]
)
def test_broken_logits_fail_their_row_only(name: str, spec: dict[str, Any]) -> None:
    logits = logits_for(3)
    rows = [row(seed=i, logprobs=2, **spec) for i in range(3)]
    whole = Sampler([EOS]).sample(logits, rows)
    BROKEN[name](logits)
    sampled = Sampler([EOS]).sample(logits, rows)
    assert sampled.failed_rows() == [1]
    assert sampled.logprobs[1] is None
    assert 0 <= int(sampled.token_ids[1]) < VOCAB
    for i in (0, 2):
        assert sampled.token_ids[i] == whole.token_ids[i]
        assert sampled.logprobs[i] == whole.logprobs[i]


def test_masked_tokens_are_allowed() -> None:
    """-inf for some tokens is no fault: those are never drawn."""
    logits = torch.full((1, VOCAB), NEVER)
    logits[0, 11] = -5.0
    for spec in ({}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 1e-30}):
        sampled = Sampler([EOS]).sample(logits, [row(**spec)])
        assert sampled.token_ids.tolist() == [11]
        assert sampled.failed_rows() == []


def test_tiny_temperature_is_greedy() -> None:
    logits = logits_for(5)
    rows = [row(temperature=1e-30, seed=i) for i in range(5)]
    assert torch.equal(Sampler([EOS]).sample(logits, rows).token_ids, logits.argmax(-1))


def test_logprobs_are_of_the_models_own_logits() -> None:
    logits = logits_for(3)
    rows = [
        row(temperature=0.0, logprobs=3, logit_bias={9: 100.0}),
        row(temperature=0.0),
        row(temperature=0.0, logprobs=0),
    ]
    sampled = Sampler([EOS]).sample(logits, rows)
    exact = logits.double().log_softmax(-1)
    first, none, bare = sampled.logprobs
    assert first is not None
    assert bare is not None
    assert none is None
    assert first.token_id == 9
    assert first.logprob == pytest.approx(float(exact[0, 9]), abs=1e-5)
    assert first.rank == 1 + int((logits[0] > logits[0, 9]).sum())
    best = exact[0].topk(3)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert (bare.rank, bare.top) == (1, [])


def test_prompt_logprobs() -> None:
    logits, ids = logits_for(4), [1, 39, 0, 7]
    found = Sampler([EOS]).prompt_logprobs(logits, ids, 2)
    exact = logits.double().log_softmax(-1)
    assert [f.token_id for f in found] == ids
    assert [f.logprob for f in found] == pytest.approx(
        [float(exact[i, t]) for i, t in enumerate(ids)]
    )
    assert [len(f.top) for f in found] == [2] * 4
    assert Sampler([EOS]).prompt_logprobs(logits[:0], [], 2) == []


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="for 1 rows"):
        Sampler([EOS]).sample(logits_for(2), [row()])
    with pytest.raises(ValueError, match="float16"):
        Sampler([EOS]).sample(logits_for(1).half(), [row()])


def _mutated(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One small mistake in the sampler."""
    if name == "prompt not penalised":
        forget = lambda r: SamplingRow(r.spec, [], r.output_token_ids, r.choice_index)  # noqa: E731
        real = sampling.adjusted
        monkeypatch.setattr(
            sampling, "adjusted", lambda x, rows, *rest: real(x, list(map(forget, rows)), *rest)
        )
    elif name == "position ignored":
        monkeypatch.setattr(sampling, "uniform", lambda s, p: uniform(s, p * 0))
    elif name == "seed ignored":
        monkeypatch.setattr(sampling, "uniform", lambda s, p: uniform(s * 0, p))
    elif name == "filters ignored":
        monkeypatch.setattr(sampling, "_floor", lambda *_: None)
    elif name == "adjustments ignored":
        monkeypatch.setattr(sampling, "adjusted", lambda x, *_: x)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "prompt not penalised",
        "position ignored",
        "seed ignored",
        "filters ignored",
        "adjustments ignored",
    ],
)
def test_mutants_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the reference finds each mistake within 60 rows."""
    _mutated(monkeypatch, name)
    rows = [
        row(prompt=[i % 9, 4], output=[7, i % 5], seed=i, top_k=i % 4, repetition_penalty=1.5)
        for i in range(60)
    ]
    logits = logits_for(60, 9)
    found = Sampler([EOS]).sample(logits, rows).token_ids.tolist()
    expected = [reference_token(v, r) for v, r in zip(logits.tolist(), rows, strict=True)]
    assert (found == expected) == (name == "")
