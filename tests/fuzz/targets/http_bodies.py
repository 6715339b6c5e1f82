"""Bodies of /v1/completions (first byte even) and /v1/chat/completions, to neo.v1's requests."""

from __future__ import annotations

import json
from typing import Any

from neo_http.chat import read_chat
from neo_http.completions import read_completion
from tests.fuzz.front import harness, parse
from tests.fuzz.target import Target


def _handle(data: bytes) -> None:
    chat = bool(data) and data[0] % 2 == 1
    question = (read_chat if chat else read_completion)(data[1:])
    for asked in question.asked:
        asked.request.ClearField("request_id")
        parse(asked.request)


def seeds() -> list[bytes]:
    common: dict[str, Any] = {
        "model": "tiny", "n": 2, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": -3,
        "logit_bias": {"5": 1.5}, "stop": ["a", "b"], "user": "me", "top_k": -1, "min_p": 0.1,
        "stop_token_ids": [3], "request_id": "r-1", "priority": 5, "cache_salt": "s",
        "placement": "gpu-only", "ttft_ms": 100.5, "timeout_ms": 1000, "prompt_cache_key": "k",
    }  # fmt: skip
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    return [
        b"\0" + json.dumps({"prompt": "Once", "logprobs": 2, "echo": True, **common}).encode(),
        b"\0" + json.dumps({"prompt": [[1, 2], [3]], "guided_regex": "a+"}).encode(),
        b"\0" + json.dumps({"prompt": [1, 2, 3], "structured_outputs": {"json": "{}"}}).encode(),
        b"\1" + json.dumps({"messages": messages, "logprobs": True, "top_logprobs": 2}).encode(),
        b"\1" + json.dumps({"messages": messages, "response_format": schema, **common}).encode(),
        b"\1"
        + json.dumps(
            {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        ).encode(),
    ]


TARGET = Target("http_bodies", harness(_handle), seeds, "text")
