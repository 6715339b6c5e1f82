"""Tensors of the Open Inference Protocol: what lies about itself is refused by name."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service.frontend.compat import kserve_messages, kserve_tensors
from neo_common.errors import Reason, ServiceError
from protos.compat import kserve_pb2 as pb

RANGES = {
    "INT8": (-(2**7), 2**7 - 1), "INT16": (-(2**15), 2**15 - 1), "INT32": (-(2**31), 2**31 - 1),
    "INT64": (-(2**63), 2**63 - 1), "UINT8": (0, 2**8 - 1), "UINT16": (0, 2**16 - 1),
    "UINT32": (0, 2**32 - 1), "UINT64": (0, 2**64 - 1),
}  # fmt: skip


def elements(datatype: str) -> st.SearchStrategy[Any]:
    if datatype in RANGES:
        return st.integers(*RANGES[datatype])
    if datatype == "BOOL":
        return st.booleans()
    if datatype == "BYTES":
        return st.text(st.characters(codec="utf-8"), max_size=8)
    return st.floats(width=32 if datatype == "FP32" else 64, allow_nan=False)


@given(st.data())
def test_both_forms_are_read_alike(data: st.DataObject) -> None:
    datatype = data.draw(st.sampled_from(sorted(kserve_tensors.KINDS)))
    values = data.draw(st.lists(elements(datatype), max_size=6))
    written = pb.ModelInferResponse()
    kserve_tensors.write_output(written, "x", datatype, values)
    raw = pb.ModelInferRequest(raw_input_contents=written.raw_output_contents)
    raw.inputs.add(name="x", datatype=datatype, shape=[len(values)])
    typed = pb.ModelInferRequest()
    tensor = typed.inputs.add(name="x", datatype=datatype, shape=[1, len(values)])
    said = [v.encode() for v in values] if datatype == "BYTES" else values
    getattr(tensor.contents, kserve_tensors.KINDS[datatype].contents).extend(said)
    assert kserve_tensors.read_inputs(raw) == {"x": values}
    assert kserve_tensors.read_inputs(typed) == {"x": values}


def lying(datatype: str, shape: list[int], raw: bytes) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    return request


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (lying("INT32", [2], bytes(4)), "its shape says 2"),
        (lying("INT32", [1], bytes(5)), "no multiple of 4"),
        (lying("INT32", [-1], bytes(4)), "negative"),
        (lying("INT32", [2**62, 2**62, 2**62], bytes(4)), "its shape says"),
        (lying("BYTES", [1], b"\x05\0\0"), "within the length"),
        (lying("BYTES", [1], b"\xff\xff\xff\xff."), "within an element"),
        (lying("BYTES", [1], b"\x01\0\0\0\xff"), "UTF-8"),
        (lying("FP16", [1], bytes(2)), "datatype"),
        (lying("", [], b""), "datatype"),
    ],
)
def test_a_lie_is_refused(request_: pb.ModelInferRequest, said: str) -> None:
    with pytest.raises(ServiceError, match=said) as refused:
        kserve_tensors.read_inputs(request_)
    assert refused.value.reason is Reason.INVALID_ARGUMENT
    assert refused.value.field is not None
    assert refused.value.field.startswith("inputs[0]")


def test_inputs_must_fit_together() -> None:
    twice = pb.ModelInferRequest(raw_input_contents=[b"", b""])
    for _ in range(2):
        twice.inputs.add(name="x", datatype="INT32", shape=[0])
    with pytest.raises(ServiceError, match="name of another"):
        kserve_tensors.read_inputs(twice)
    short = pb.ModelInferRequest(raw_input_contents=[b""])
    for name in "xy":
        short.inputs.add(name=name, datatype="INT32", shape=[0])
    with pytest.raises(ServiceError, match="1 entries for 2 inputs"):
        kserve_tensors.read_inputs(short)
    both = lying("INT32", [1], bytes(4))
    both.inputs[0].contents.int_contents.append(1)
    with pytest.raises(ServiceError, match="beside"):
        kserve_tensors.read_inputs(both)


names = st.sampled_from(
    ["text_input", "input_ids", "sampling_parameters", "stream", "temperature", "stop", "seed", ""]
)


@given(st.data())
def test_any_request_is_read_or_refused(data: st.DataObject) -> None:
    """Nothing but ServiceError, whatever comes."""
    request = pb.ModelInferRequest()
    for _ in range(data.draw(st.integers(0, 4))):
        tensor = request.inputs.add(
            name=data.draw(names),
            datatype=data.draw(st.sampled_from([*kserve_tensors.KINDS, "FP16"])),
            shape=data.draw(st.lists(st.integers(-1, 3), max_size=2)),
        )
        if data.draw(st.booleans()):
            text = data.draw(st.sampled_from(['{"n": 1e999}', '{"seed": -1}', "[" * 9999, "{}"]))
            tensor.contents.bytes_contents.append(text.encode())
        else:
            request.raw_input_contents.append(data.draw(st.binary(max_size=12)))
    for name in data.draw(st.lists(names, max_size=3)):
        request.parameters[name].CopyFrom(
            data.draw(
                st.sampled_from(
                    [
                        pb.InferParameter(),
                        pb.InferParameter(int64_param=-(2**63)),
                        pb.InferParameter(uint64_param=2**64 - 1),
                        pb.InferParameter(double_param=float("nan")),
                        pb.InferParameter(string_param="1e400"),
                        pb.InferParameter(bool_param=True),
                    ]
                )
            )
        )
    refusal = None
    try:
        question = kserve_messages.read_question(request)
    except ServiceError as error:
        refusal = error
    if refusal is None:
        assert question.request.WhichOneof("prompt")
    else:
        assert refusal.reason is Reason.INVALID_ARGUMENT


def asking(**parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest()
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"hello")
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
        setattr(request.parameters[name], kind[type(value)], value)
    return request


def test_parameters_become_fields() -> None:
    question = kserve_messages.read_question(
        asking(temperature=1, top_k=-1, seed="7", stop="x", ignore_eos=True, return_logprobs=True)
    )
    sampling = question.request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (1.0, 0, 7)
    assert list(sampling.stop) == ["x"]
    assert sampling.ignore_eos
    assert sampling.logprobs == 0  # asked for without a number of alternatives
    assert question.outputs == ("text_output", "logprobs")
    assert question.prefix == "hello"
    assert kserve_messages.read_question(asking(exclude_input_in_output=True)).prefix == ""
    assert kserve_messages.read_question(asking(stream=True)).prefix == ""


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"no_such": 1}, "no_such"),
        ({"temperature": "warm"}, "temperature is not a number"),
        ({"max_tokens": 1.5}, "max_tokens is not an integer"),
        ({"max_tokens": True}, "max_tokens is not an integer"),
        ({"ignore_eos": "yes"}, "ignore_eos is not a boolean"),
        ({"seed": -1}, "seed is out of range"),
        ({"stream": True, "exclude_input_in_output": False}, "exclude_input_in_output"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ServiceError, match=said):
        kserve_messages.read_question(asking(**parameters))


def test_a_parameter_is_given_once() -> None:
    request = asking(seed=1)
    request.inputs.add(name="seed", datatype="UINT64", shape=[1])
    request.inputs[0].ClearField("contents")
    request.raw_input_contents.extend([struct.pack("<I", 1) + b"x", struct.pack("<Q", 1)])
    with pytest.raises(ServiceError, match="seed is given twice"):
        kserve_messages.read_question(request)
