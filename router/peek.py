"""What the router reads of a request: the model's name and how the prompt begins, from the wire
format, without building the message.

    GenerateRequest   0a 03 a b c | 12 05 t i n y 0 | 1a c8 01 O n c e  u p o n ...
                      request_id    model             text: its first bytes are enough

Nothing is checked: what is malformed is the backend's to refuse, and the keys are then empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from protos.compat import kserve_pb2 as kserve
from protos.compat import vllm_engine_pb2 as vllm
from protos.neo.v1 import inference_pb2 as inference

PROMPT_BYTES = 16 << 10
"""As much of a prompt is looked at."""
TEXT_BYTES = 4
"""Of a token in text: an average of languages and tokenizers, good enough to compare queues."""
ID_BYTES = 2
"""Of a token as a number: most take two, those above 16,383 three."""
MAX_FIELDS = 10_000
"""Of a message, with those within its prompt: more would hold up the router's other calls (a
megabyte of empty ones took 0.3 s), and nobody who wants to be served well sends as many."""
_LENGTH_DELIMITED = 2
_BYTES_OF = {1: 8, 5: 4}  # of fixed64 and fixed32


@dataclass(frozen=True)
class Peeked:
    model: str = ""
    """"" when the request names none, or has no such field."""
    prompt: bytes = field(default=b"", repr=False)
    """How the prompt begins, in whatever form it was sent: equal beginnings are equal bytes."""
    prompt_tokens: int = 0
    """How many it has, about."""


@dataclass(frozen=True)
class Layout:
    """Where a message keeps things: field numbers."""

    model: int | None = None
    prompts: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Field -> the field within it that holds the prompt (0: the field itself does), and how many
    bytes at its front are something else."""


def _number(message: object, name: str) -> int:
    number: int = message.DESCRIPTOR.fields_by_name[name].number  # type: ignore[attr-defined]
    return number


_GENERATE = Layout(
    _number(inference.GenerateRequest, "model"),
    {
        _number(inference.GenerateRequest, "text"): (0, 0),
        _number(inference.GenerateRequest, "token_ids"): (1, 0),
        # Messages are whole in it, one behind the other: a longer chat begins like a shorter one.
        _number(inference.GenerateRequest, "chat"): (0, 0),
    },
)
_INFER = Layout(
    _number(kserve.ModelInferRequest, "model_name"),
    # Each element of a BYTES tensor stands behind its length in four bytes.
    {_number(kserve.ModelInferRequest, "raw_input_contents"): (0, 4)},
)
_NEO = "/neo.v1.InferenceService/"
_KSERVE = "/inference.GRPCInferenceService/"
LAYOUTS: Mapping[str, Layout] = {
    f"{_NEO}Generate": _GENERATE,
    f"{_NEO}GenerateStream": _GENERATE,
    f"{_NEO}GetModel": Layout(_number(inference.GetModelRequest, "model")),
    f"{_NEO}Tokenize": Layout(_number(inference.TokenizeRequest, "model")),
    f"{_NEO}Detokenize": Layout(_number(inference.DetokenizeRequest, "model")),
    "/vllm.grpc.engine.VllmEngine/Generate": Layout(
        None,
        {
            _number(vllm.GenerateRequest, "tokenized"): (
                _number(vllm.TokenizedInput, "input_ids"),
                0,
            ),
            _number(vllm.GenerateRequest, "text"): (0, 0),
        },
    ),
    f"{_KSERVE}ModelInfer": _INFER,
    f"{_KSERVE}ModelStreamInfer": _INFER,
    f"{_KSERVE}ModelReady": Layout(_number(kserve.ModelReadyRequest, "name")),
    f"{_KSERVE}ModelMetadata": Layout(_number(kserve.ModelMetadataRequest, "name")),
    f"{_KSERVE}ModelConfig": Layout(_number(kserve.ModelConfigRequest, "name")),
}
"""Method -> where its request keeps things; methods that are not here name no model."""


def peek(path: str, request: bytes) -> Peeked:
    """path: `/package.Service/Method`."""
    layout = LAYOUTS.get(path)
    if layout is None:
        return Peeked()
    model, prompt, per_token = b"", (0, 0), TEXT_BYTES
    left = iter(range(MAX_FIELDS))
    try:
        for number, start, end in fields(request, 0, len(request), left):
            if number == layout.model:
                model = request[start:end]
            elif number in layout.prompts:
                found = _within(request, start, end, left, *layout.prompts[number])
                # Of several inputs the longest is the prompt; elsewhere the last one counts.
                if layout is not _INFER or found[1] - found[0] > prompt[1] - prompt[0]:
                    prompt = found
                    per_token = ID_BYTES if layout.prompts[number][0] else TEXT_BYTES
        start, end = prompt
        tokens = (end - start) // per_token
        return Peeked(model.decode(), request[start : min(end, start + PROMPT_BYTES)], tokens)
    except (IndexError, UnicodeDecodeError):
        return Peeked()


def _within(
    data: bytes, start: int, end: int, left: Iterator[int], inner: int, skipped: int
) -> tuple[int, int]:
    """Where the prompt is in a field that lies from `start` to `end`."""
    if inner:
        start, end = next(
            ((s, e) for number, s, e in fields(data, start, end, left) if number == inner),
            (end, end),
        )
    return min(start + skipped, end), end


def fields(
    data: bytes, start: int, end: int, left: Iterator[int]
) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each length-delimited field of a message that lies from `start` to
    `end`; others are passed over, and what comes after as many fields as are `left`. Raises
    IndexError where this is no message."""
    for _ in left:
        if start >= end:
            break
        tag, start = _varint(data, start)
        wire_type = tag & 7
        if wire_type == 0:
            _, start = _varint(data, start)
        elif wire_type == _LENGTH_DELIMITED:
            length, start = _varint(data, start)
            if start + length > end:
                raise IndexError
            yield tag >> 3, start, start + length
            start += length
        elif wire_type in _BYTES_OF:
            start += _BYTES_OF[wire_type]
        else:
            raise IndexError  # groups, which nobody sends
    if start > end:
        raise IndexError


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = data[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    for shift in range(7, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError
