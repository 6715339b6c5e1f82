"""Grammars: which tokens may come next, what the sampler makes of that, and what is refused."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, grammar_from

from gpu_service.engine.messages import SamplingSpec
from gpu_service.frontend.structured import grammar_of
from gpu_service.model import adjust, sampling
from gpu_service.model.adjust import SamplingRow
from gpu_service.model.sampling import Sampler
from gpu_service.model.structured import GrammarChecker, Guide, Guides, Recent, compiled, lexicon
from gpu_service.model.tokenizer import Tokenizer, load_tokenizer
from neo_common.errors import Reason, ServiceError
from protos.neo.v1 import types_pb2 as types
from tests.support.models import tiny_model_dir
from tests.support.mutants import mutated

VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_model_dir(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> LLTokenizer:
    return lexicon(tokenizer, VOCAB)


def guide(words: LLTokenizer, kind: str, text: str) -> Guide:
    done: Future[LLMatcher] = Future()
    done.set_result(compiled(words, grammar_from(kind, text)))
    return Guide(done)


def allowed(following: Guide, output: list[int]) -> set[int]:
    found = following.allowed(output)
    assert found is not None
    bits = np.unpackbits(found.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def test_only_what_continues_the_text_is_allowed(tokenizer: Tokenizer, words: LLTokenizer) -> None:
    """The test model's tokens are bytes, so what may follow can be told by hand."""
    texts = ["abc", "abd", "x"]
    (eos,) = tokenizer.eos_token_ids
    following = guide(words, "choice", '["abc", "abd", "x"]')
    written = ""
    output: list[int] = []
    while True:
        fitting = [text for text in texts if text.startswith(written)]
        nexts = {text[len(written)] for text in fitting if len(text) > len(written)}
        expected = {tokenizer.encode(c, add_special_tokens=False)[0] for c in nexts}
        if written in texts:
            expected.add(eos)
        assert allowed(following, output) == expected
        if written in texts:
            break
        written += min(nexts)
        output = tokenizer.encode(written, add_special_tokens=False)
    assert written == "abc"


def test_several_tokens_at_once_and_none(tokenizer: Tokenizer, words: LLTokenizer) -> None:
    output = tokenizer.encode("ab", add_special_tokens=False)
    stepwise, at_once = (guide(words, "regex", "abc+") for _ in range(2))
    for length in range(3):
        last = allowed(stepwise, output[:length])
    assert allowed(at_once, output) == last
    assert allowed(at_once, output) == last  # asked again without news


def test_a_grammar_that_turns_out_too_complex_is_a_problem(words: LLTokenizer) -> None:
    following = guide(words, "regex", "a*")
    assert allowed(following, [])
    # A token that the grammar does not have: the matcher can go on no further.
    assert following.allowed([5, 6]) is None
    assert "too complex" in following.problem


# -- the sampler --------------------------------------------------------------------------------


def row(following: Guide, output: list[int], **spec: float) -> SamplingRow:
    made = SamplingSpec(max_tokens=64, grammar="g", **spec)  # type: ignore[arg-type]
    return SamplingRow(made, [1], output, guide=following)


def free_row() -> SamplingRow:
    return SamplingRow(SamplingSpec(max_tokens=64, temperature=0.0), [1], [])


def check_masking(words: LLTokenizer) -> None:
    """Every token but the allowed ones, in rows between others, greedy and not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, VOCAB, generator=generator) * 3
    before = logits.clone()
    rows = []
    guides = [guide(words, "regex", "[0-9]{3}"), guide(words, "choice", '["yes", "no"]')]
    for following, temperature in itertools.product(guides, (0.0, 50.0)):
        rows.append(row(following, [], temperature=temperature, seed=3))
    rows.insert(1, free_row())
    rows.append(free_row())
    drawn = Sampler((257,)).sample(logits, rows)
    assert torch.equal(logits, before)
    assert bool(drawn.finite.all())
    tokens = drawn.token_ids.tolist()
    for index in (1, 5):
        assert tokens[index] == int(before[index].argmax())
    permitted = [allowed(following, []) for following in guides for _ in range(2)]
    for index, may in zip((0, 2, 3, 4), permitted, strict=True):
        assert tokens[index] in may
    for index, may in ((0, permitted[0]), (3, permitted[2])):
        best = max(may, key=lambda token: float(before[index, token]))
        assert tokens[index] == best


def test_masking(words: LLTokenizer) -> None:
    check_masking(words)


MUTANTS = [
    ("bits == 0", "bits != 0"),
    ("logits[index].masked_fill_", "logits[index + 1].masked_fill_"),
    ('bitorder="little"', 'bitorder="big"'),
    ("np.array(guided, np.int64)", "np.array(guided[::-1], np.int64)"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_noticed(
    words: LLTokenizer, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = mutated(adjust, old, new, tmp_path)
    monkeypatch.setattr(sampling, "adjusted", wrong.adjusted)
    with pytest.raises((AssertionError, IndexError)):
        check_masking(words)


def test_a_row_without_a_way_on_is_not_finite(words: LLTokenizer) -> None:
    following = guide(words, "regex", "a*")
    drawn = Sampler((257,)).sample(torch.zeros(2, VOCAB), [row(following, [5]), free_row()])
    assert drawn.finite.tolist() == [False, True]
    assert following.problem


# -- the front end ------------------------------------------------------------------------------


def asked(**fields: object) -> types.SamplingParams:
    return types.SamplingParams(structured=types.StructuredOutput(**fields))  # type: ignore[arg-type]


async def refusal(checker: GrammarChecker, params: types.SamplingParams) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        await grammar_of(params, checker)
    assert refused.value.reason is Reason.INVALID_ARGUMENT
    assert "<state>" not in refused.value.message
    return refused.value


async def test_what_cannot_be_followed_is_refused(tokenizer: Tokenizer) -> None:
    checker = GrammarChecker(tokenizer, VOCAB)
    wrong = {
        "json_schema": ["", "{", "[]", '{"type": "no such"}', "[" * 9000, '{"$ref": "http://h/x"}'],
        "regex": ["", "(", "(?=a)", r"(a)\1"],
        "grammar": ["", "start: nothing", "::", 'start: "a" ->'],
    }
    for field, texts in wrong.items():
        for text in texts:
            error = await refusal(checker, asked(**{field: text}))
            assert error.field == f"sampling.structured.{field}", text
    for field, value in (("choices", types.ChoiceList(texts=["a", ""])), ("json_object", False)):
        assert (await refusal(checker, asked(**{field: value}))).field is not None
    assert (await refusal(checker, asked())).field == "sampling.structured"
    large = asked(regex="a" * (64 << 10))
    assert "65536 bytes" in (await refusal(checker, large)).message
    with_min = asked(regex="a")
    with_min.min_tokens = 1
    assert (await refusal(checker, with_min)).field == "sampling.min_tokens"
    with_eos = asked(regex="a")
    with_eos.ignore_eos = True
    assert (await refusal(checker, with_eos)).field == "sampling.ignore_eos"


def entangled_schema(size: int) -> str:
    alternatives = [
        {"anyOf": [{"properties": {f"a{i}": {"const": j}}} for i in range(size)]}
        for j in range(size)
    ]
    return json.dumps({"allOf": alternatives})


EXPLOSIVE = [
    ("regex", r"(.*a){20}.{300}"),
    ("regex", r"((a{1,100}){1,100}){1,1000}b"),
    ("regex", "(a|b)*a" + "(a|b)" * 60),
    ("grammar", 'start: start start | "a" | ""'),
    ("json_schema", entangled_schema(15)),
]


async def test_explosive_grammars_cost_little(tokenizer: Tokenizer) -> None:
    """Followed or refused, soon: 40 times what this takes on an idle machine."""
    checker = GrammarChecker(tokenizer, VOCAB)
    started = time.monotonic()
    outcomes = await asyncio.gather(
        *(grammar_of(asked(**{field: text}), checker) for field, text in EXPLOSIVE),
        return_exceptions=True,
    )
    for outcome in outcomes:
        assert isinstance(outcome, str | ServiceError)
    assert time.monotonic() - started < 20


async def test_a_grammar_is_compiled_once(tokenizer: Tokenizer) -> None:
    checker = GrammarChecker(tokenizer, VOCAB)
    first, second = await asyncio.gather(*(grammar_of(asked(regex="a+"), checker) for _ in "ab"))
    assert first == second
    made: list[str] = []
    recent: Recent[str] = Recent(2)

    def use(key: str) -> None:
        recent.get(key, lambda: made.append(key) or key)  # type: ignore[func-returns-value]

    for key in "abacab":
        use(key)
    assert made == ["a", "b", "c", "b"]  # "b" was the least recently used when "c" came


def test_guides_compile_beside(tokenizer: Tokenizer) -> None:
    guides = Guides(lambda: tokenizer, VOCAB)
    try:
        fine, broken = guides.guide(grammar_from("regex", "[xy]")), guides.guide("start: (")
        x, y = tokenizer.encode("xy", add_special_tokens=False)
        assert allowed(fine, []) == {x, y}
        # One compiled grammar serves many choices, each at its own place.
        assert allowed(guides.guide(grammar_from("regex", "[xy]")), [x]) == set(
            tokenizer.eos_token_ids
        )
        assert allowed(fine, []) == {x, y}
        assert broken.allowed([]) is None
        assert broken.problem
    finally:
        guides.close()


@settings(max_examples=30, deadline=None)
@given(st.from_regex(r"\A[a-c]{1,3}(\|[a-c]{1,3}){0,2}\Z"), st.data())
def test_any_walk_ends_in_a_match(
    tokenizer: Tokenizer, words: LLTokenizer, pattern: str, data: st.DataObject
) -> None:
    following = guide(words, "regex", f"({pattern}){{1,2}}")
    output: list[int] = []
    while True:
        may = sorted(allowed(following, output))
        assert may
        token = data.draw(st.sampled_from(may))
        if token in tokenizer.eos_token_ids:
            break
        output = [*output, token]
    assert re.fullmatch(f"({pattern}){{1,2}}", tokenizer.decode(output))


def test_a_model_with_fewer_tokens_than_its_tokenizer(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="vocab"):
        lexicon(tokenizer, 100)
