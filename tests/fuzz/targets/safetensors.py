"""model.safetensors, plain and with fp8's scales, and the index of shards."""

from __future__ import annotations

import json

import torch

from gpu_service.model.spec import read_spec
from gpu_service.model.weights import SafetensorsSource, check_source, model_tensors
from tests.fuzz import files
from tests.fuzz.target import Target, clear

_INDEX = b"index"


def _one(data: bytes) -> None:
    """Begins with `index`, and is one; or it is the tensors."""
    index = files.folder() / "st" / "model.safetensors.index.json"
    files.file("st/config.json", json.dumps(files.CONFIG).encode())
    if data.startswith(_INDEX):
        files.file("st/model.safetensors", seeds()[0])
        files.file("st/model.safetensors.index.json", data[len(_INDEX) :])
    else:
        index.unlink(missing_ok=True)
        files.file("st/model.safetensors", data)
    spec = read_spec(files.folder() / "st")
    for fp8 in (False, True):
        try:
            source = SafetensorsSource(files.folder() / "st", fp8=fp8)
            check_source(source, spec)
            for name in source.shapes():
                assert isinstance(source.read(name), torch.Tensor)
        except ValueError as error:
            clear(error)


def seeds() -> list[bytes]:
    spec = read_spec(files.file("st/config.json", json.dumps(files.CONFIG).encode()).parent)
    shapes = model_tensors(spec)
    plain = files.safetensors(shapes, b"")
    names = dict.fromkeys(shapes, "model.safetensors")
    scaled = plain.replace(b'"F32"', b'"F8_E4M3"', 1)
    return [plain, scaled, _INDEX + json.dumps({"weight_map": names}).encode()]


_WORDS = (b'"F8_E4M3"', b'"BF16"', b"[]", b"[1]", b"[0]", b"[18446744073709551615]", b"..", b"/")
TARGET = Target("safetensors", _one, seeds, "text", _WORDS, max_bytes=32768, smoke=60)
