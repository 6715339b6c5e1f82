"""Requests of inference.GRPCInferenceService: tensors, and parameters in three places."""

from __future__ import annotations

import struct

from gpu_service.frontend.compat import kserve_messages as messages
from protos.compat import kserve_pb2 as pb
from tests.fuzz.front import harness, parse, request_of
from tests.fuzz.target import Target


def _handle(data: bytes) -> None:
    question = messages.read_question(request_of(pb.ModelInferRequest, data))
    parse(question.request)


def seeds() -> list[bytes]:
    raw = pb.ModelInferRequest(model_name="tiny", id="1")
    raw.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    raw.inputs.add(name="temperature", datatype="FP32", shape=[1])
    raw.inputs.add(name="stream", datatype="BOOL", shape=[1])
    raw.raw_input_contents.extend([struct.pack("<I", 4) + b"Once", struct.pack("<f", 0.5), b"\1"])
    raw.outputs.add(name="text_output")
    typed = pb.ModelInferRequest(model_name="tiny")
    ids = typed.inputs.add(name="input_ids", datatype="INT32", shape=[3])
    ids.contents.int_contents.extend([1, 2, 3])
    text = typed.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b'{"top_k": "5", "stop": ["a", "b"], "seed": 3}')
    typed.parameters["max_tokens"].int64_param = 5
    typed.parameters["triton_enable_empty_final_response"].bool_param = True
    return [raw.SerializeToString(), typed.SerializeToString()]


TARGET = Target(
    "kserve_requests",
    harness(_handle),
    seeds,
    "wire",
    (b'{"\\ud800": 1}', b'{"n": 1e999}', b"\x80\x80\x80\x80\x80\x80\x80\x80\x40" * 9),
)
