"""Who is to blame in bytes that do not parse."""

from __future__ import annotations

import time

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from neo_common.grpc.malformed import bad_text_field
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import types_pb2 as types

MESSAGE = pb.GenerateRequest.DESCRIPTOR


def request() -> pb.GenerateRequest:
    """Text in every depth, and fields of every wire type before it."""
    return pb.GenerateRequest(
        request_id="REQUEST",
        model="MODEL",
        chat=types.Chat(messages=[types.ChatMessage(role="user", content="CONTENT")]),
        sampling=types.SamplingParams(
            temperature=0.5, seed=2**63, max_tokens=300, logit_bias={5: 1.5}, stop=["x", "STOP"]
        ),
        scheduling=types.SchedulingParams(priority=-1, tpot_ms=3.0),
    )


@pytest.mark.parametrize(
    ("word", "field"),
    [
        (b"REQUEST", "request_id"),
        (b"MODEL", "model"),
        (b"CONTENT", "chat.messages.content"),
        (b"STOP", "sampling.stop"),
    ],
)
def test_the_field_is_found(word: bytes, field: str) -> None:
    data = request().SerializeToString()
    assert bad_text_field(MESSAGE, data) is None
    spoilt = data.replace(word, b"\xff" * len(word))
    with pytest.raises(DecodeError):
        pb.GenerateRequest.FromString(spoilt)
    assert bad_text_field(MESSAGE, spoilt) == field


def test_unknown_fields_are_passed_over() -> None:
    unknown = b"\xfa\x7f\x02\xff\xfe"  # field 2047, two bytes
    assert bad_text_field(MESSAGE, unknown + b"\x12\x01\xff") == "model"


@given(st.binary(max_size=200))
def test_any_bytes_are_looked_through(data: bytes) -> None:
    field = bad_text_field(MESSAGE, data)
    if field is not None:
        with pytest.raises(DecodeError):
            pb.GenerateRequest.FromString(data)


def test_long_nonsense_ends_soon() -> None:
    started = time.perf_counter()
    assert bad_text_field(MESSAGE, b"\x08\x01" * (8 << 20)) is None
    assert time.perf_counter() - started < 2.0
