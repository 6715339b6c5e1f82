"""Forms of structured output: JSON schemas, regular expressions, grammars, compiled as the front
end does before it takes a request."""

from __future__ import annotations

import json

from gpu_service.frontend.structured import grammar_of
from protos.neo.v1 import types_pb2 as types
from tests.fuzz.front import checker, harness, wait
from tests.fuzz.target import Target

_KINDS = ("json_schema", "regex", "grammar", "choices")


def _handle(data: bytes) -> None:
    """The first byte says what the rest is."""
    kind = _KINDS[data[0] % len(_KINDS)] if data else "regex"
    text = data[1:].decode(errors="replace")
    structured = types.StructuredOutput()
    if kind == "choices":
        structured.choices.texts.extend(text.split("\n"))
    else:
        setattr(structured, kind, text)
    wait(grammar_of(types.SamplingParams(structured=structured), checker()))


def seeds() -> list[bytes]:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 9, "pattern": "^[a-z]+$"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
        },
        "required": ["name"],
        "additionalProperties": False,
        "$defs": {"tag": {"enum": ["a", "b"]}},
    }
    return [
        b"\0" + json.dumps(schema).encode(),
        b"\0" + json.dumps({"anyOf": [{"const": 1}, {"type": "number", "multipleOf": 3}]}).encode(),
        rb"1[a-z]{3,9}(\d+|\p{L}*)?(foo|bar)x",
        b'2start: expr\nexpr: NUM ("+" NUM)*\nNUM: /[0-9]+/\n%ignore " "\n',
        b'2root ::= ("yes" | "no") [0-9]{1,3} "."\n',
        b"3yes\nno",
    ]


TARGET = Target(
    "grammars",
    harness(_handle),
    seeds,
    "text",
    (b"{0,999}", b"(a|b)*", b".*", b"~30000", b'"$ref": "#"', b'"allOf": [', b"&", b"%json {}"),
    max_bytes=1024,
    smoke=60,
)
