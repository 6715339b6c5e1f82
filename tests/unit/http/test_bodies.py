"""JSON bodies as calls of neo.v1: what each field becomes, and what is refused."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_common.errors import Reason, ServiceError
from neo_http.chat import ChatBody, read_chat
from neo_http.completions import CompletionBody, read_completion
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import types_pb2 as types


def completion(**fields: Any) -> pb.GenerateRequest:
    question = read_completion(json.dumps({"prompt": "p", **fields}).encode())
    (asked,) = question.asked
    return asked.request


def chat(**fields: Any) -> pb.GenerateRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return read_chat(json.dumps(body).encode()).asked[0].request


def refused(read: Any, body: bytes | dict[str, Any]) -> ServiceError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ServiceError) as error:
        read(data)
    assert error.value.reason is Reason.INVALID_ARGUMENT
    return error.value


@pytest.mark.parametrize(
    ("given", "field", "becomes"),
    [
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 1.5}, "temperature", 1.5),
        ({"top_p": 0.25}, "top_p", 0.25),
        ({"top_k": 7}, "top_k", 7),
        ({"top_k": -1}, "top_k", 0),
        ({"min_p": 0.5}, "min_p", 0.5),
        ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
        ({"presence_penalty": -2}, "presence_penalty", -2.0),
        ({"frequency_penalty": 2}, "frequency_penalty", 2.0),
        ({"seed": 5}, "seed", 5),
        ({"seed": -1}, "seed", 2**64 - 1),
        ({"logit_bias": {"17": -100, "3": 1.5}}, "logit_bias", {17: -100.0, 3: 1.5}),
        ({"min_tokens": 3}, "min_tokens", 3),
        ({"stop": "x"}, "stop", ["x"]),
        ({"stop": ["x", "y"]}, "stop", ["x", "y"]),
        ({"stop": None}, "stop", []),
        ({"stop_token_ids": [1, 2]}, "stop_token_ids", [1, 2]),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"n": 4}, "n", 4),
        ({"prompt_logprobs": 2}, "prompt_logprobs", 2),
    ],
)
@pytest.mark.parametrize("ask", [completion, chat])
def test_sampling(ask: Any, given: dict[str, Any], field: str, becomes: Any) -> None:
    value = getattr(ask(**given).sampling, field)
    if isinstance(becomes, dict):
        assert dict(value) == becomes
    elif isinstance(becomes, list):
        assert list(value) == becomes
    else:
        assert value == becomes


@pytest.mark.parametrize("ask", [completion, chat])
def test_what_is_not_said_is_left_to_the_server(ask: Any) -> None:
    request = ask(temperature=None, top_p=None, n=None, user="u", seed=None, logit_bias=None)
    for name in ("temperature", "top_p", "n", "seed", "logprobs", "structured", "top_k"):
        assert not request.sampling.HasField(name), name
    assert request.scheduling == types.SchedulingParams()
    assert request.model == ""


def test_max_tokens() -> None:
    assert completion().sampling.max_tokens == 16, "OpenAI's default"
    assert completion(max_tokens=3).sampling.max_tokens == 3
    assert not chat().sampling.HasField("max_tokens")
    assert chat(max_tokens=3).sampling.max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=4).sampling.max_tokens == 4
    assert refused(read_completion, {"prompt": "p", "max_tokens": 0}).field == "max_tokens"
    assert completion(max_tokens=0, echo=True).sampling.max_tokens == 1


def test_logprobs() -> None:
    assert completion(logprobs=3).sampling.logprobs == 3
    echoed = completion(logprobs=3, echo=True)
    assert echoed.sampling.prompt_logprobs == 3
    assert not completion(echo=True).sampling.HasField("prompt_logprobs")
    asked = chat(logprobs=True).sampling
    assert asked.HasField("logprobs")
    assert asked.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).sampling.logprobs == 5
    assert not chat(logprobs=False).sampling.HasField("logprobs")
    message = {"role": "user", "content": "x"}
    refusal = refused(read_chat, {"messages": [message], "top_logprobs": 5})
    assert refusal.field == "top_logprobs"


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, types.StructuredOutput(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"type": "null"}},
                }
            },
            types.StructuredOutput(json_schema='{"type":"null"}'),
        ),
        ({"guided_json": {"a": 1}}, types.StructuredOutput(json_schema='{"a":1}')),
        ({"guided_json": '{"a": 1}'}, types.StructuredOutput(json_schema='{"a": 1}')),
        ({"guided_regex": "a+"}, types.StructuredOutput(regex="a+")),
        ({"guided_grammar": "start: x"}, types.StructuredOutput(grammar="start: x")),
        (
            {"guided_choice": ["a", "b"]},
            types.StructuredOutput(choices=types.ChoiceList(texts=["a", "b"])),
        ),
        ({"structured_outputs": {"regex": "a"}}, types.StructuredOutput(regex="a")),
        ({"structured_outputs": {"json": {}}}, types.StructuredOutput(json_schema="{}")),
        (
            {"structured_outputs": {"json_object": True}},
            types.StructuredOutput(json_object=True),
        ),
        ({"structured_outputs": {"json_object": False}}, None),
    ],
)
@pytest.mark.parametrize("ask", [completion, chat])
def test_structured(ask: Any, given: dict[str, Any], becomes: Any) -> None:
    sampling = ask(**given).sampling
    assert sampling.HasField("structured") == (becomes is not None)
    if becomes is not None:
        assert sampling.structured == becomes


def test_scheduling() -> None:
    asked = chat(
        priority=5, placement="cpu_preferred", ttft_ms=100, tpot_ms=20.5, cache_salt="s"
    ).scheduling
    assert asked.priority == -5, "smaller is earlier, as in vLLM"
    assert asked.placement == types.PLACEMENT_CPU_PREFERRED
    assert (asked.ttft_ms, asked.tpot_ms, asked.cache_salt) == (100.0, 20.5, "s")


@pytest.mark.parametrize(
    ("prompt", "becomes"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts(prompt: Any, becomes: list[Any]) -> None:
    question = read_completion(json.dumps({"prompt": prompt, "request_id": "r"}).encode())
    found = [each.request.text or list(each.request.token_ids.ids) for each in question.asked]
    assert found == becomes
    ids = [each.request.request_id for each in question.asked]
    assert ids == (["cmpl-r"] if len(becomes) == 1 else ["cmpl-r-0", "cmpl-r-1"])
    assert question.identity == "cmpl-r"


def test_messages() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = chat(
        messages=[
            {"role": "developer", "content": "be"},
            {"role": "user", "content": parts},
            # As the client gives an answer back.
            {"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "audio": None},
        ]
    )
    said = [(message.role, message.content) for message in asked.chat.messages]
    assert said == [("system", "be"), ("user", "one\ntwo"), ("assistant", "x")]


def test_tokenizer_switches() -> None:
    assert completion(skip_special_tokens=False).include_special_tokens
    assert not completion().include_special_tokens
    assert completion(add_special_tokens=False).skip_special_tokens_in_prompt


NOT_SERVED: list[tuple[Any, dict[str, Any], str]] = [
    (read_chat, {"tools": [{"type": "function"}]}, "tools"),
    (read_chat, {"tool_choice": "required"}, "tool_choice"),
    (read_chat, {"functions": [{}]}, "functions"),
    (read_chat, {"audio": {"voice": "x"}}, "audio"),
    (read_chat, {"modalities": ["text", "audio"]}, "modalities"),
    (read_chat, {"reasoning_effort": "low"}, "reasoning_effort"),
    (read_chat, {"store": True}, "store"),
    (read_chat, {"web_search_options": {}}, "web_search_options"),
    (read_chat, {"chat_template": "x"}, "chat_template"),
    (read_chat, {"continue_final_message": True}, "continue_final_message"),
    (read_chat, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (read_chat, {"stream_options": {"include_usage": True}}, "stream_options"),
    (read_chat, {"messages": []}, "messages"),
    (read_chat, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    (read_chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        read_chat,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
    ),
    (
        read_chat,
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
    ),
    (read_chat, {"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages[0].name"),
    (read_completion, {"suffix": "x"}, "suffix"),
    (read_completion, {"best_of": 3}, "best_of"),
    (read_completion, {"best_of": 3, "n": 2}, "best_of"),
    (read_completion, {"use_beam_search": True}, "use_beam_search"),
    (read_completion, {"bad_words": ["x"]}, "bad_words"),
    (read_completion, {"length_penalty": True}, "length_penalty"),
    (read_completion, {"frobnicate": 1}, "frobnicate"),
    (read_completion, {"prompt": []}, "prompt"),
    (read_completion, {"prompt": ["a", 1]}, "prompt"),
    (read_completion, {"prompt": [-1]}, "prompt"),
    (read_completion, {"prompt": [2**32]}, "prompt"),
    (read_completion, {"prompt": ["a"] * 129}, "prompt"),
    (read_completion, {"prompt": ["a"] * 100, "n": 3}, "prompt"),
    (read_completion, {"prompt": None}, "prompt"),
    (read_completion, {"prompt": [[1.5]]}, "prompt[0][0]"),
    (read_completion, {"n": -1}, "n"),
    (read_completion, {"n": True}, "n"),
    (read_completion, {"n": 2**40}, "n"),
    (read_completion, {"n": "2"}, "n"),
    (read_completion, {"temperature": "hot"}, "temperature"),
    (read_completion, {"seed": 2**64}, "seed"),
    (read_completion, {"top_k": -2}, "top_k"),
    (read_completion, {"logit_bias": {"x": 1}}, "logit_bias"),
    (read_completion, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (read_completion, {"logit_bias": {"\u0661": 1}}, "logit_bias"),
    (read_completion, {"logit_bias": {"1": "x"}}, "logit_bias[...]"),
    (read_completion, {"stop": [1]}, "stop[0]"),
    (read_completion, {"priority": 101}, "priority"),
    (read_completion, {"timeout_ms": 0}, "timeout_ms"),
    (read_completion, {"request_id": ""}, "request_id"),
    (read_completion, {"request_id": "x" * 101}, "request_id"),
    (read_completion, {"request_id": "x\r\nSet-Cookie: y"}, "request_id"),
    (read_completion, {"request_id": "\u00e9"}, "request_id"),
    (read_completion, {"placement": "moon"}, "placement"),
    (read_completion, {"response_format": {"type": "yaml"}}, "response_format.type"),
    (
        read_completion,
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
    ),
    (
        read_completion,
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        "response_format",
    ),
    (
        read_completion,
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs",
    ),
    (
        read_completion,
        {"structured_outputs": {"structural_tag": "x"}},
        "structured_outputs.structural_tag",
    ),
]


@pytest.mark.parametrize(
    ("read", "given", "field"), NOT_SERVED, ids=[str(given)[:50] for _, given, _ in NOT_SERVED]
)
def test_what_cannot_be_honoured_is_refused_by_name(
    read: Any, given: dict[str, Any], field: str
) -> None:
    base: dict[str, Any] = {"prompt": "p"}
    if read is read_chat:
        base = {"messages": [{"role": "user", "content": "hi"}]}
    error = refused(read, {**base, **given})
    assert error.field == field
    assert field in error.message


@pytest.mark.parametrize(
    "given",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "store": False},
        {"modalities": ["text"], "service_tier": "auto", "audio": None, "metadata": {"a": "b"}},
        {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "best_of": 1},
        {"add_generation_prompt": True, "use_beam_search": False, "length_penalty": 1.0},
    ],
)
def test_what_changes_nothing_is_taken(given: dict[str, Any]) -> None:
    assert chat(**given)


HOSTILE = {
    "nothing": b"",
    "no JSON": b"hello",
    "cut off": b'{"prompt": "x"',
    "more behind it": b'{"prompt": "x"} x',
    "a list": b"[]",
    "null": b"null",
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": Infinity}',
    "too large for a float": b'{"prompt": "x", "temperature": 1e999}',
    "a number of many digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "deep lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep unknown": b'{"store": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep schema": b'{"prompt": "x", "guided_json": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "a long name": b'{"' + b"x" * 100_000 + b'": 1}',
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", [read_completion, read_chat])
def test_hostile_bodies(read: Any, name: str) -> None:
    assert len(refused(read, HOSTILE[name]).message) < 1000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.text(max_size=5), "content": st.text(max_size=5) | VALUES}
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize(
    ("read", "kind"), [(read_completion, CompletionBody), (read_chat, ChatBody)]
)
def test_any_json_is_understood_or_refused(read: Any, kind: Any, data: Any) -> None:
    names = st.sampled_from(kind.__struct_fields__)
    body = data.draw(st.dictionaries(names, VALUES, max_size=5))
    if read is read_chat and data.draw(st.booleans()):
        body["messages"] = data.draw(st.lists(MESSAGES, max_size=3))
    elif data.draw(st.booleans()):
        body["prompt"] = "p"
    with contextlib.suppress(ServiceError):
        question = read(json.dumps(body).encode())
        assert all(each.request.SerializeToString() for each in question.asked)
