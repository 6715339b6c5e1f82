"""A GGUF file: header, shape, tokenizer, tensors."""

from __future__ import annotations

import struct

import torch

from gpu_service.model.spec import read_spec
from gpu_service.model.tokenizer import load_tokenizer
from gpu_service.model.weights import check_source, open_source
from tests.fuzz import files
from tests.fuzz.target import Target, clear

_DEVICE = torch.device("cpu")


def _one(data: bytes) -> None:
    path = files.file("model.gguf", data)
    try:
        spec = read_spec(path)
        source = open_source(path, spec, "auto", _DEVICE)
        check_source(source, spec)
        for name in source.shapes():
            source.read(name)
    except ValueError as error:
        clear(error)
    try:
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode("a ab \u00e9"))
        tokenizer.token_bytes(7)
    except ValueError as error:
        clear(error)


def seeds() -> list[bytes]:
    data = bytes(4 * 40 * 32)
    shapes = files.shapes()
    return [
        files.gguf(files.metadata("gpt2"), shapes, data),
        files.gguf(files.metadata("llama"), shapes, data),
        files.gguf({**files.metadata("llama"), "llama.rope.scaling.type": "yarn"}, shapes, data),
        files.gguf(files.metadata("gpt2"), {**shapes, "rope_freqs.weight": (8,)}, data),
    ]


_TYPES = tuple(struct.pack("<I", kind) for kind in range(13))
TARGET = Target(
    "gguf", _one, seeds, words=(*_TYPES, b"\xff" * 8, struct.pack("<Q", 2**61)), max_bytes=16384
)
