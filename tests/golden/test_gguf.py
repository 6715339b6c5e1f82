"""GGUF files against their Hugging Face twins and against `transformers`' own reading of them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gpu_service.model import weights
from gpu_service.model.gguf_file import GgufFile
from gpu_service.model.model import load_model
from gpu_service.model.spec import read_spec
from tests.support import gguf_models, models

PROMPT = [(7 * i) % models.VOCAB for i in range(90)]
# GGUF has no key for Qwen2's windows in some layers only.
WRITABLE = [name for name in models.VARIANTS if name != "qwen2-window"]
# transformers reads no rope scaling, no windows and no explicit head_dim from GGUF.
ORACLE = ["llama2", "mistral-full", "qwen2"]


@pytest.mark.parametrize("variant", WRITABLE)
def test_same_logits_as_the_hugging_face_twin(variant: str, tmp_path: Path) -> None:
    """Names, un-permuted Q and K rows, biases, rope scaling and windows: all exact in F32."""
    path = gguf_models.write_gguf(tmp_path, variant)
    ours = models.dense_logits(load_model(path, dtype="float32"), PROMPT)
    twin = models.dense_logits(load_model(tmp_path / "hf", dtype="float32"), PROMPT)
    assert torch.equal(ours, twin)


@pytest.mark.parametrize("variant", ["llama", "mistral"])
def test_permuted_rows_left_as_they_are_fail(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_models.write_gguf(tmp_path, variant)
    twin = models.dense_logits(load_model(tmp_path / "hf", dtype="float32"), PROMPT)
    spec = read_spec(path)
    source = weights.GgufSource(GgufFile(path), spec)
    monkeypatch.setattr(source, "_heads", {})
    monkeypatch.setattr(weights, "open_source", lambda *_: source)
    wrong = models.dense_logits(load_model(path, dtype="float32"), PROMPT)
    assert (wrong - twin).abs().max() > 1


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_same_logits_as_transformers(kind: str, tmp_path: Path) -> None:
    path = gguf_models.write_gguf(tmp_path, "llama2", kind)
    ours = models.dense_logits(load_model(path, dtype="float32"), PROMPT)
    theirs = models.reference_logits(gguf_models.reference_from_gguf(path), PROMPT)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 5e-5


@pytest.mark.parametrize("variant", ORACLE)
def test_same_weights_as_transformers(variant: str, tmp_path: Path) -> None:
    path = gguf_models.write_gguf(tmp_path, variant, "Q8_0")
    spec = read_spec(path)
    source = weights.GgufSource(GgufFile(path), spec)
    theirs = gguf_models.reference_from_gguf(path).state_dict()
    for name in source.shapes():
        torch.testing.assert_close(source.read(name).float(), theirs[name], rtol=0, atol=0)


def test_metadata_equals_the_librarys_reading(tmp_path: Path) -> None:
    path = gguf_models.write_gguf(tmp_path, "llama", "Q4_1")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    keys = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == keys
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(map(int, reversed(tensor.shape)))
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(mine.shape)
        np.testing.assert_array_equal(ours.dequantised(tensor.name), expected)
