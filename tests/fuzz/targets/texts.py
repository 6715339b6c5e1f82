"""Prompts of the worst kind for tokenizers: an input is repeated up to 32 KiB before it is cut."""

from __future__ import annotations

from functools import cache

from gpu_service.model.tokenizer import Tokenizer, load_tokenizer
from tests.fuzz import files
from tests.fuzz.target import Finding, Target

CHARACTERS = 1 << 15


@cache
def _tokenizers() -> list[Tokenizer]:
    """Cut as Llama 3, Qwen 2 and SmolLM do, and not at all, as SentencePiece's BPE."""
    found = []
    for pre in ("llama-bpe", "qwen2", "smollm", "gpt-2"):
        settings = {**files.metadata("gpt2"), "tokenizer.ggml.pre": pre}
        found.append(settings)
    found.append(files.metadata("llama"))
    return [
        load_tokenizer(files.file(f"t{i}.gguf", files.gguf(each, files.shapes(), b"")))
        for i, each in enumerate(found)
    ]


def _one(data: bytes) -> None:
    text = data[1:].decode(errors="replace") or "a"
    text = (text * (CHARACTERS // len(text) + 1))[:CHARACTERS]
    known = _tokenizers()
    chosen = known[data[0] % len(known) if data else 0]
    ids = chosen.encode(text)
    if not all(0 <= token < chosen.vocab_size for token in ids):
        raise Finding("ids outside of the vocabulary")
    stream = chosen.stream(())
    for token in ids[:256]:
        stream.step(token)


def seeds() -> list[bytes]:
    texts = ["Once upon, 3 of them.\n", " ", "\n \n", "a", "\u0301", "ab", "\u1100\u1161", "1"]
    return [bytes([i]) + text.encode() for i in range(5) for text in texts]


TARGET = Target("texts", _one, seeds, "text", max_bytes=256, smoke=10)
