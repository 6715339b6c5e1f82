"""Headers of checkpoints whose numbers overflow, overlap or point elsewhere."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.model.spec import read_spec
from gpu_service.model.weights import SafetensorsSource, check_source, model_tensors, open_source
from tests.fuzz import files

CPU = torch.device("cpu")


def read_all(path: Path) -> None:
    spec = read_spec(path)
    source = open_source(path, spec, "auto", CPU)
    check_source(source, spec)
    for name in source.shapes():
        source.read(name)


def at(offset: int) -> bytes:
    """A whole file, but for where its last tensor lies."""
    data = files.gguf(files.metadata("gpt2"), files.shapes(), bytes(4 * 40 * 32))
    begin = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8 + 4
    return data[:begin] + struct.pack("<Q", offset) + data[begin + 8 :]


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(at(0))
    read_all(path)


@pytest.mark.parametrize("offset", [5120, 5120 - 127, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_tensor_that_lies_outside(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(at(offset))
    with pytest.raises(ValueError, match="truncated: tensor output_norm"):
        read_all(path)


@pytest.mark.parametrize("place", ["tensors", "keys", "key", "value"])
@pytest.mark.parametrize("number", [2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
def test_counts_beyond_the_file(tmp_path: Path, place: str, number: int) -> None:
    data = files.gguf(files.metadata("gpt2"), files.shapes(), b"")
    begin = {"tensors": 8, "keys": 16, "key": 24, "value": 24 + 8 + len("general.architecture") + 4}
    path = tmp_path / "model.gguf"
    spot = begin[place]
    path.write_bytes(data[:spot] + struct.pack("<Q", number) + data[spot + 8 :])
    with pytest.raises(ValueError, match="its header is damaged"):
        read_spec(path)


def header_with(change: dict[str, Any]) -> bytes:
    """One whole tensor, `model.norm.weight`, and what is other about it."""
    shape = {"dtype": "F32", "shape": [32], "data_offsets": [0, 128], **change}
    text = json.dumps({"model.norm.weight": shape}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(128)


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [2**64 - 128, 2**64]},
        {"data_offsets": [128, 0]},
        {"data_offsets": [64, 192]},
        {"data_offsets": [-128, 0]},
        {"shape": [2**62, 8]},
        {"shape": [2**64, 1]},
        {"shape": [-1, -32]},
        {"shape": [33]},
        {"dtype": "F31"},
    ],
    ids=str,
)
def test_tensors_that_lie_outside(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "model.safetensors").write_bytes(header_with(change))
    with pytest.raises(ValueError, match="is missing, damaged or truncated"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_of_another_size(tmp_path: Path, size: int) -> None:
    data = struct.pack("<Q", size) + header_with({})[8:]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="is missing, damaged or truncated"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", ".", "a\0b", "\ud800"])
def test_shards_that_are_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(files.CONFIG))
    tensors = model_tensors(read_spec(folder))
    (tmp_path / "model.safetensors").write_bytes(files.safetensors(tensors, b""))
    index = {"weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"which is not in|is missing, damaged"):
        SafetensorsSource(folder)
