"""What a request says of the form of its output, checked, as the grammar that the core follows."""

from __future__ import annotations

import asyncio
import json
import re

from llguidance import LLMatcher, grammar_from

from gpu_service.frontend.validate import invalid
from gpu_service.model.structured import MAX_GRAMMAR_BYTES, GrammarChecker
from protos.neo.v1 import types_pb2 as types

FIELD = "sampling.structured"
INLINE_BYTES = 2000
"""What is longer is translated in a thread, off the event loop: 64 KiB of GBNF take 0.2 s."""
MAX_TERMINALS = 400
"""Of a grammar. When it fails, its compiler takes the square of how deep they lie in each other:
14 s for 1,500 of them."""
_TERMINAL = re.compile(r"^[ \t]*[?!]?_?[A-Z][A-Z_0-9]*[ \t]*[.:{]", re.MULTILINE)
# Small models love to go on with blanks for ever. A schema's own `x-guidance` overrules it.
_BLANKS = r"[\x20\x0A\x0D\x09]{1,33}"


async def grammar_of(params: types.SamplingParams, checker: GrammarChecker) -> str:
    """In llguidance's form; "" where any output will do. Raises ServiceError."""
    if not params.HasField("structured"):
        return ""
    if params.ignore_eos:
        raise invalid("sampling.ignore_eos", f"cannot be combined with {FIELD}")
    if params.min_tokens:
        raise invalid("sampling.min_tokens", f"cannot be combined with {FIELD}")
    if params.structured.ByteSize() > MAX_GRAMMAR_BYTES:
        raise invalid(FIELD, f"has more than {MAX_GRAMMAR_BYTES} bytes")
    kind = params.structured.WhichOneof("format")
    if kind is None:
        raise invalid(FIELD, "must say what the output is to be")
    try:
        if params.structured.ByteSize() <= INLINE_BYTES:
            grammar = _translated(params.structured, kind)
        else:
            grammar = await asyncio.to_thread(_translated, params.structured, kind)
        await checker.check(grammar)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{FIELD}.{kind}", f"cannot be followed: {error}") from None
    return grammar


def _translated(structured: types.StructuredOutput, kind: str) -> str:
    """Raises ValueError."""
    if kind == "json_object":
        if not structured.json_object:
            raise ValueError("it is false")
        return LLMatcher.grammar_from_json_schema(
            {"type": "object"}, {"whitespace_pattern": _BLANKS}
        )
    if kind == "choices":
        texts = list(structured.choices.texts)
        if not texts or not all(texts):
            raise ValueError("there must be texts, none of them empty")
        return grammar_from("choice", json.dumps(texts))
    text: str = getattr(structured, kind)
    if not text:
        raise ValueError("it is empty")
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(text, {"whitespace_pattern": _BLANKS})
    if kind == "regex":
        return grammar_from("regex", text)
    if len(_TERMINAL.findall(text)) > MAX_TERMINALS:
        raise ValueError(f"it has more than {MAX_TERMINALS} terminals")
    return grammar_from("grammar", text)
