"""The scanner reads what protobuf reads, and never fails."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from protos.compat import kserve_pb2 as kserve
from protos.compat import vllm_engine_pb2 as vllm
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types
from router.keys import MODEL_HEADER, SESSION_HEADER, CallKeys, keys_of
from router.peek import LAYOUTS, PROMPT_BYTES, peek

GENERATE = "/neo.v1.InferenceService/GenerateStream"
VLLM = "/vllm.grpc.engine.VllmEngine/Generate"
INFER = "/inference.GRPCInferenceService/ModelInfer"

texts = st.text(max_size=300)
ids = st.lists(st.integers(0, 2**32 - 1), max_size=100)
chats = st.builds(
    types.Chat,
    messages=st.lists(st.builds(types.ChatMessage, role=texts, content=texts), max_size=4),
)
requests = st.builds(
    inference.GenerateRequest,
    request_id=texts,
    model=texts,
    sampling=st.builds(types.SamplingParams, seed=st.integers(0, 2**64 - 1), stop=st.lists(texts)),
    token_ids_only=st.booleans(),
)


def beginning(request: inference.GenerateRequest) -> bytes:
    """Its prompt as it is on the wire, less what tells its length."""
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return request.text.encode()[:PROMPT_BYTES]
    if kind == "chat":
        return request.chat.SerializeToString()[:PROMPT_BYTES]
    return b"" if kind is None else b"".join(map(varint, request.token_ids.ids))[:PROMPT_BYTES]


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


@given(requests, st.none() | texts | ids | chats)
def test_it_reads_what_protobuf_reads(request: Any, prompt: Any) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, list):
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    elif prompt is not None:
        request.chat.CopyFrom(prompt)
    data = request.SerializeToString()
    peeked = peek(GENERATE, data)
    assert (peeked.model, peeked.prompt) == (request.model, beginning(request))


@given(st.lists(requests, max_size=3), st.binary(max_size=8))
def test_the_last_of_several_counts_as_in_protobuf(parts: list[Any], tail: bytes) -> None:
    """Messages in a row are one message; whatever protobuf takes, the model is the same."""
    data = b"".join(part.SerializeToString() for part in parts) + tail
    try:
        parsed = inference.GenerateRequest.FromString(data)
    except DecodeError:
        peek(GENERATE, data)  # whatever it says, it does not fail
        return
    unknown_groups = any(byte & 7 in (3, 4) for byte in tail)
    assert peek(GENERATE, data).model == parsed.model or unknown_groups


@given(st.sampled_from([*LAYOUTS, "/a.B/C"]), st.binary(max_size=200))
def test_garbage_is_read_as_nothing_much(path: str, data: bytes) -> None:
    peeked = peek(path, data)
    assert len(peeked.prompt) <= len(data)


@given(requests, st.data())
def test_truncated_requests(request: Any, data: st.DataObject) -> None:
    whole = request.SerializeToString()
    peek(GENERATE, whole[: data.draw(st.integers(0, len(whole)))])


@pytest.mark.parametrize("longer", [5, 500, 50_000])
def test_a_longer_conversation_begins_like_the_shorter_one(longer: int) -> None:
    """The lengths that stand before fields would differ in their first byte."""
    short, long = list(range(1000, 1300)), list(range(1000, 1300 + longer))
    token_ids = [
        inference.GenerateRequest(token_ids=types.TokenIds(ids=each)).SerializeToString()
        for each in (short, long)
    ]
    tokenized = [
        vllm.GenerateRequest(
            tokenized=vllm.TokenizedInput(original_text="x" * len(each), input_ids=each)
        ).SerializeToString()
        for each in (short, long)
    ]
    said = [types.ChatMessage(role="user", content=f"turn {n} " * 40) for n in range(20)]
    chat = [
        inference.GenerateRequest(chat=types.Chat(messages=said[:count])).SerializeToString()
        for count in (2, 20)
    ]
    for path, pair in ((GENERATE, token_ids), (VLLM, tokenized), (GENERATE, chat)):
        first, second = (peek(path, each).prompt for each in pair)
        assert first
        assert second.startswith(first)


@pytest.mark.parametrize("sampling_first", [False, True])
def test_the_prompt_of_an_open_inference_request(sampling_first: bool) -> None:
    prompt = "Once upon a time, " * 4
    raw = [len(each).to_bytes(4, "little") + each for each in (prompt.encode(), b'{"n": 1}')]
    request = kserve.ModelInferRequest(
        model_name="m", raw_input_contents=raw[::-1] if sampling_first else raw
    )
    for method in (INFER, "/inference.GRPCInferenceService/ModelStreamInfer"):
        peeked = peek(method, request.SerializeToString())
        assert (peeked.model, peeked.prompt) == ("m", prompt.encode())


def test_headers_say_session_and_model() -> None:
    request = vllm.GenerateRequest(text="hi").SerializeToString()
    metadata = ((SESSION_HEADER, "s" * 1000), (MODEL_HEADER, "small"), ("other", "x"))
    assert keys_of(VLLM, request, metadata) == CallKeys("small", b"s" * 256, b"hi")
    named = inference.GenerateRequest(model="large").SerializeToString()
    assert keys_of(GENERATE, named, metadata).model == "large", "a field goes before a header"
    assert keys_of(VLLM, b"", None) == CallKeys()


def test_prompts_do_not_show_in_logs() -> None:
    keys = keys_of(GENERATE, inference.GenerateRequest(text="secret").SerializeToString(), ())
    assert keys.prompt == b"secret"
    assert "secret" not in f"{keys!r} {keys}"


def test_every_request_with_a_model_is_known() -> None:
    """A method added to a proto is not forgotten here."""
    for module, name in (
        (inference, "InferenceService"), (vllm, "VllmEngine"), (kserve, "GRPCInferenceService"),
    ):  # fmt: skip
        service = module.DESCRIPTOR.services_by_name[name]
        for method in service.methods:
            named = {"model", "model_name"} & set(method.input_type.fields_by_name)
            if service is not vllm.DESCRIPTOR.services_by_name["VllmEngine"]:
                named |= {"name"} & set(method.input_type.fields_by_name)
            layout = LAYOUTS.get(f"/{service.full_name}/{method.name}")
            assert bool(named) == bool(layout and layout.model), method.full_name
