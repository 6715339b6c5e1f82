"""tokenizer.json, and the settings with the chat template beside it (first byte odd)."""

from __future__ import annotations

import json

from gpu_service.model.tokenizer import load_tokenizer
from tests.fuzz import files
from tests.fuzz.front import tokenizer
from tests.fuzz.target import Target, clear


def _one(data: bytes) -> None:
    settings = bool(data) and data[0] % 2 == 1
    files.file("tok/config.json", json.dumps(files.CONFIG).encode())
    files.file("tok/tokenizer.json", tokenizer().to_json().encode() if settings else data[1:])
    files.file("tok/tokenizer_config.json", data[1:] if settings else b"{}")
    try:
        loaded = load_tokenizer(files.folder() / "tok")
        ids = loaded.encode("a <s> b \u00e9\u0301")
        loaded.decode(ids)
        for token in ids:
            loaded.token_bytes(token)
        if loaded.has_chat_template:
            loaded.render_chat([{"role": "user", "content": "hi"}])
    except ValueError as error:
        clear(error)


def seeds() -> list[bytes]:
    template = (
        "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no') }}{% endif %}"
        "{{ bos_token + m['content'] | trim }}{% endfor %}{{ strftime_now('%Y') }}"
    )
    bpe = {
        "version": "1.0",
        "added_tokens": [
            {"id": 5, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\w+|\\s"}, "behavior": "Isolated",
                          "invert": False},
        "decoder": {"type": "ByteLevel"},
        "post_processor": {
            "type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}},
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "\u0120": 3, "<unk>": 4},
                  "merges": [["a", "b"]], "unk_token": "<unk>", "byte_fallback": True},
    }  # fmt: skip
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    named = {"chat_template": [{"name": "default", "template": template}]}
    texts = [b"\0" + json.dumps(bpe).encode()]
    return texts + [b"\1" + json.dumps(each).encode() for each in (settings, named)]


_WORDS = (b"{{", b"}}", b"{% for i in range(9) %}", b"{% endfor %}", b"messages", b"|tojson", b"**")
TARGET = Target("tokenizer_files", _one, seeds, "text", _WORDS)
