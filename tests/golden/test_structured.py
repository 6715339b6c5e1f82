"""Outputs keep to their grammars, and are the same ones in every mode and wherever KV moves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jsonschema
import msgspec
import pytest
from llguidance import grammar_from

from gpu_service.engine.messages import Submit
from gpu_service.model.model import CausalLM, load_model
from gpu_service.model.tokenizer import load_tokenizer
from tests.golden.test_engine import HOW
from tests.support.engine import (
    Answers,
    config,
    greedy,
    local_core,
    prompt,
    real_core,
    run,
    triton_core,
)
from tests.support.mixed_sampling import assert_same
from tests.support.models import tiny_model_dir

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["kind", "age", "tags"],
    "additionalProperties": False,
}
WISHES = {
    "schema": ("json_schema", json.dumps({**SCHEMA, "x-guidance": {"whitespace_flexible": False}})),
    "regex": ("regex", r"[a-f]{3}-[0-9]{2,4}"),
    "choice": ("choice", '["yes", "no", "perhaps"]'),
    "grammar": ("grammar", 'start: "(" start ")" | "." '),
    "free": ("", ""),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", head_dim=16)


@cache
def loaded(directory: Path) -> CausalLM:
    return load_model(directory, dtype="float32")


def requests() -> list[Submit]:
    """Each wish greedily, and drawn with two choices."""
    made = []
    for number, (name, (kind, text)) in enumerate(WISHES.items()):
        for temperature, n in ((0.0, 1), (1.0, 2)):
            one = greedy(f"{name}-{n}", prompt(20 + number, seed=number), 90)
            sampling = msgspec.structs.replace(
                one.sampling,
                grammar=grammar_from(kind, text) if kind else "",
                temperature=temperature,
                n=n,
                seed=5,
                ignore_eos=not kind,
            )
            made.append(msgspec.structs.replace(one, sampling=sampling))
    return made


def texts(directory: Path, answers: Answers) -> dict[tuple[str, int], str]:
    tokenizer = load_tokenizer(directory)
    return {key: tokenizer.decode(tokens) for key, tokens in answers.tokens.items()}


def check(name: str, text: str) -> None:
    if name == "schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif name == "regex":
        assert re.fullmatch(WISHES["regex"][1], text)
    elif name == "choice":
        assert text in json.loads(WISHES["choice"][1])
    elif name == "grammar":
        depth = text.index(".")
        assert text == "(" * depth + "." + ")" * depth


@cache
def expected(directory: Path) -> dict[tuple[str, int], list[int]]:
    made = config(directory, offload="never")
    return run(local_core(made, loaded(directory), host_blocks=0), requests()).tokens


def test_outputs_keep_to_their_grammars(directory: Path) -> None:
    answers = run(
        local_core(config(directory, offload="never"), loaded(directory), host_blocks=0), requests()
    )
    for (request, index), text in texts(directory, answers).items():
        if answers.finishes[request, index] == "stop":
            check(request.partition("-")[0], text)
        else:  # only what may go on for ever was cut off
            assert request.startswith(("free", "grammar"))
    assert sum(finish == "stop" for finish in answers.finishes.values()) >= 9


@pytest.mark.parametrize("how", [how for how in HOW if how != "never"])
def test_the_same_outputs_in_every_mode(directory: Path, how: str) -> None:
    made = config(directory, cpu_services=("local",), **{"gpu_kv_blocks": 24, **HOW[how]})
    host_blocks = 0 if made.offload == "never" else 96
    core = local_core(made, loaded(directory), host_blocks=host_blocks)
    assert run(core, requests()).tokens == expected(directory)


def few(wish: str, question: Sequence[int]) -> Submit:
    one = greedy(wish, list(question), 120)
    sampling = msgspec.structs.replace(
        one.sampling, grammar=grammar_from(*WISHES[wish]), ignore_eos=False
    )
    return msgspec.structs.replace(one, sampling=sampling)


@pytest.mark.timeout(300)
def test_a_real_model_and_tokenizer() -> None:
    tokenizer = load_tokenizer("smollm2")
    question = tokenizer.render_chat([{"role": "user", "content": "Describe a dog."}])
    with real_core(config("smollm2", dtype="float32", gpu_kv_blocks=64, offload="never")) as core:
        answers = run(core, [few(wish, question) for wish in ("schema", "regex", "choice")])
    for (wish, index), tokens in answers.tokens.items():
        assert answers.finishes[wish, index] == "stop"
        check(wish, tokenizer.decode(tokens))


def test_beside_draws_of_the_device(directory: Path) -> None:
    """What runs on a CUDA device, in Triton's interpreter: guided rows are drawn on the host, those
    beside them on the device."""
    pytest.importorskip("triton")
    asked = []
    for name, text, temperature in (("a", "[ab]{2}", 0.0), ("b", "x{1,3}y", 1.0), ("c", "", 1.0)):
        one = greedy(name, prompt(6), 4, temperature=temperature, seed=2, logprobs=1)
        if text:
            sampling = msgspec.structs.replace(
                one.sampling, grammar=grammar_from("regex", text), ignore_eos=False
            )
            one = msgspec.structs.replace(one, sampling=sampling)
        asked.append(one)
    made = config(directory, offload="never", max_batch_tokens=64)
    ours = run(triton_core(made, load_model(directory, dtype="float32")), asked)
    theirs = run(local_core(made, loaded(directory), host_blocks=0), asked)
    assert_same(ours, theirs)
    assert ours.finishes["a", 0] == "stop"
