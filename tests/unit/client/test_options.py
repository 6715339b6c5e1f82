"""From what a caller says to the message on the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest

from neo_client.client import tokenize_request
from neo_client.connect import Retries, service_config
from neo_client.options import (
    Prompt,
    Sampling,
    Scheduling,
    Structured,
    generate_request,
)
from protos.neo.v1 import engine_pb2, inference_pb2, router_pb2, types_pb2


def test_what_is_not_said_is_absent() -> None:
    message = Sampling().to_proto()
    assert message == types_pb2.SamplingParams()
    assert not message.HasField("temperature")


def test_every_field_arrives() -> None:
    said: dict[str, Any] = {
        "temperature": 0.0, "top_p": 0.5, "top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5,
        "presence_penalty": -1.0, "frequency_penalty": 2.0, "seed": 2**63, "logit_bias": {5: -1.5},
        "max_tokens": 9, "min_tokens": 2, "stop": ["a", "b"], "stop_token_ids": [3],
        "ignore_eos": True, "n": 2, "logprobs": 0, "prompt_logprobs": 1,
        "structured": Structured(regex="a+"),
    }  # fmt: skip
    assert set(said) == {field.name for field in types_pb2.SamplingParams.DESCRIPTOR.fields}
    message = Sampling(**said).to_proto()
    for name, value in said.items():
        got = getattr(message, name)
        value = value.to_proto() if name == "structured" else value
        got = dict(got) if name == "logit_bias" else list(got) if isinstance(value, list) else got
        assert got == value, name
    assert message.HasField("logprobs"), "0 is not absent"


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", -1), ("top_k", 1.5), ("seed", 2**64), ("stop", [1]), ("temperature", "hot")],
)
def test_what_the_message_cannot_hold_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} cannot be"):
        Sampling(**{field: value}).to_proto()


def test_structured() -> None:
    assert Structured({"type": "object"}).to_proto().json_schema == '{"type": "object"}'
    assert Structured(json_schema="{}").to_proto().json_schema == "{}"
    assert list(Structured(choices=["a", "b"]).to_proto().choices.texts) == ["a", "b"]
    assert Structured(json_object=True).to_proto().json_object
    for wrong in (Structured(), Structured(regex="a", json_object=True)):
        with pytest.raises(ValueError, match="exactly one"):
            wrong.to_proto()


def test_scheduling() -> None:
    message = Scheduling("cpu-preferred", priority=-3, tpot_ms=50.0).to_proto()
    assert message.placement == types_pb2.PLACEMENT_CPU_PREFERRED
    assert (message.priority, message.tpot_ms, message.HasField("ttft_ms")) == (-3, 50.0, False)
    assert Scheduling().to_proto() == types_pb2.SchedulingParams()
    with pytest.raises(ValueError, match=r"^placement must be one of auto"):
        Scheduling("moon").to_proto()


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("text", "text"),
        ("", "text"),
        ([1, 2], "token_ids"),
        ([{"role": "user", "content": "x"}], "chat"),
    ],
)
def test_three_kinds_of_prompt(prompt: Prompt, kind: str) -> None:
    assert generate_request(prompt).WhichOneof("prompt") == kind


def test_prompts_keep_their_content() -> None:
    assert list(generate_request([3, 1, 2]).token_ids.ids) == [3, 1, 2]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    messages = generate_request(chat).chat.messages
    assert [(m.role, m.content) for m in messages] == [("system", "s"), ("user", "u")]


@pytest.mark.parametrize(
    "prompt",
    [[], [1, "a"], [-1], [{"role": "user"}], [{"role": "user", "content": "x"}, 3], [True]],
)
def test_mixed_and_empty_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"^(prompt|chat message)"):
        generate_request(prompt)


def test_tokenize_takes_text_or_chat() -> None:
    assert tokenize_request("a", "", skip_special_tokens=True).text == "a"
    chat: Prompt = [{"role": "user", "content": "u"}]
    assert tokenize_request(chat, "m", skip_special_tokens=False).chat.messages[0].content == "u"
    with pytest.raises(ValueError, match=r"^prompt must be text or chat"):
        tokenize_request([1], "", skip_special_tokens=False)


def test_retries_name_methods_that_exist_and_none_that_act() -> None:
    services = {
        f"neo.v1.{name}": {method.name for method in service.methods}
        for file in (inference_pb2, engine_pb2, router_pb2)
        for name, service in file.DESCRIPTOR.services_by_name.items()
    }
    named = {
        (name["service"], name["method"])
        for config in json.loads(service_config(Retries(), balanced=False))["methodConfig"]
        for name in config["name"]
    }
    assert all(method in services[service] for service, method in named)
    assert not {method for _, method in named} & {"Abort", "Drain", "DrainBackend"}
