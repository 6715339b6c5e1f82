"""Tensors of the Open Inference Protocol: a stranger's, checked, as Python values; and back.

Bytes of a tensor are either in its typed `contents` or, for all tensors of a request at once, in
`raw_input_contents`: little-endian numbers, and for BYTES each element's length in four bytes
before it (Open Inference Protocol v2, "Tensor Contents").
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from gpu_service.frontend.validate import invalid
from protos.compat import kserve_pb2 as pb

Value = bool | int | float | str


@dataclass(frozen=True)
class _Kind:
    code: str
    """Of module struct, for one element; "" for BYTES."""
    contents: str
    """Field of InferTensorContents."""


KINDS = {
    "BOOL": _Kind("?", "bool_contents"),
    "INT8": _Kind("b", "int_contents"),
    "INT16": _Kind("h", "int_contents"),
    "INT32": _Kind("i", "int_contents"),
    "INT64": _Kind("q", "int64_contents"),
    "UINT8": _Kind("B", "uint_contents"),
    "UINT16": _Kind("H", "uint_contents"),
    "UINT32": _Kind("I", "uint_contents"),
    "UINT64": _Kind("Q", "uint64_contents"),
    "FP32": _Kind("f", "fp32_contents"),
    "FP64": _Kind("d", "fp64_contents"),
    "BYTES": _Kind("", "bytes_contents"),
}
_LENGTH = struct.Struct("<I")
MAX_DIMENSIONS = 8
"""Their product takes the square of their number: 100,000 of them stopped the event loop for a
minute."""


def read_inputs(request: pb.ModelInferRequest) -> dict[str, list[Value]]:
    """Each input's elements by its name; BYTES as text. Raises ServiceError naming the input."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(
            "raw_input_contents", f"has {len(raw)} entries for {len(request.inputs)} inputs"
        )
    found: dict[str, list[Value]] = {}
    for number, tensor in enumerate(request.inputs):
        field = f"inputs[{number}]"
        if tensor.name in found:
            raise invalid(field, "has the name of another input")
        found[tensor.name] = _read(field, tensor, raw[number] if raw else None)
    return found


def _read(
    field: str, tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None
) -> list[Value]:
    kind = KINDS.get(tensor.datatype)
    if kind is None:
        raise invalid(f"{field}.datatype", f"must be one of {', '.join(KINDS)}")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise invalid(f"{field}.shape", f"has more than {MAX_DIMENSIONS} dimensions")
    if any(size < 0 for size in tensor.shape):
        raise invalid(f"{field}.shape", "has a negative size")
    count = math.prod(tensor.shape)
    if raw is not None and tensor.HasField("contents"):
        raise invalid(f"{field}.contents", "is given beside raw_input_contents")
    values: Sequence[Value | bytes]
    if raw is None:
        values = getattr(tensor.contents, kind.contents)
    elif not kind.code:
        values = _split(field, raw)
    else:
        values = _unpack(field, raw, kind.code)
    if len(values) != count:
        raise invalid(field, f"has {len(values)} elements, and its shape says {count}")
    return [_text(field, value) if isinstance(value, bytes) else value for value in values]


def _unpack(field: str, raw: bytes, code: str) -> tuple[Value, ...]:
    size = struct.calcsize("<" + code)
    if len(raw) % size:
        raise invalid(field, f"has {len(raw)} bytes, no multiple of {size}")
    return struct.unpack(f"<{len(raw) // size}{code}", raw)


def _split(field: str, raw: bytes) -> list[bytes]:
    elements, position = [], 0
    while position < len(raw):
        if position + _LENGTH.size > len(raw):
            raise invalid(field, "ends within the length of an element")
        (length,) = _LENGTH.unpack_from(raw, position)
        position += _LENGTH.size
        if position + length > len(raw):
            raise invalid(field, "ends within an element")
        elements.append(raw[position : position + length])
        position += length
    return elements


def _text(field: str, element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise invalid(field, "holds bytes that are not valid UTF-8") from None


def write_output(
    response: pb.ModelInferResponse, name: str, datatype: str, values: Sequence[Value]
) -> None:
    """Append a tensor of shape [len(values)], its bytes among the raw contents."""
    response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
    code = KINDS[datatype].code
    if code:
        raw = struct.pack(f"<{len(values)}{code}", *values)
    else:
        encoded = [str(value).encode() for value in values]
        raw = b"".join(_LENGTH.pack(len(element)) + element for element in encoded)
    response.raw_output_contents.append(raw)
