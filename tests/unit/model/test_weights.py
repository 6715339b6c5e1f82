"""Reading checkpoints: shards, dummies, and every way in which files can be wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gpu_service.model.gguf_file import GgufFile
from gpu_service.model.model import load_model
from gpu_service.model.spec import read_spec
from gpu_service.model.tokenizer import load_tokenizer
from tests.support import gguf_models, models

PROMPT = [(11 * i) % models.VOCAB for i in range(40)]
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_model_dir(tmp_path_factory.mktemp("single"), "qwen3")


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_models.write_gguf(tmp_path_factory.mktemp("gguf"), "llama2", "Q8_0")


def changed(
    source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> Path:
    """A copy of the model at `source` with other tensors."""
    shutil.copytree(source, target)
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, target / "model.safetensors")
    return target


def test_shards_equal_one_file(single: Path, tmp_path: Path) -> None:
    sharded = models.tiny_model_dir(tmp_path, "qwen3", shard="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    whole, parts = (load_model(d, dtype="float32") for d in (single, sharded))
    assert torch.equal(models.dense_logits(whole, PROMPT), models.dense_logits(parts, PROMPT))


def test_progress_rises_to_the_models_size(single: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    load_model(single, dtype="bfloat16", progress=lambda *call: calls.append(call))
    stages, done, totals = zip(*calls, strict=True)
    parameters = sum(t.numel() for t in models.reference_model(single).state_dict().values())
    assert set(stages) == {"weights"}
    assert list(done) == sorted(done)
    assert done[0] == 0
    assert done[-1] == totals[-1] == 2 * parameters
    assert len(set(totals)) == 1


def test_dtypes(single: Path) -> None:
    assert load_model(single).dtype == torch.float32  # the checkpoint's own
    half = load_model(single, dtype=torch.float16)
    assert models.dense_logits(half, PROMPT).isfinite().all()
    with pytest.raises(ValueError, match="dtype: 'int4' is not known"):
        load_model(single, dtype="int4")


def test_dummy_needs_only_the_config(single: Path, tmp_path: Path) -> None:
    shutil.copy(single / "config.json", tmp_path)
    first, second = (load_model(tmp_path, load_format="dummy") for _ in range(2))
    logits = models.dense_logits(first, PROMPT)
    assert torch.equal(logits, models.dense_logits(second, PROMPT))
    assert logits.isfinite().all()
    assert logits.std() > 0
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="load_format: 'fast' is not known"):
        load_model(tmp_path, load_format="fast")


def test_missing_tensor(single: Path, tmp_path: Path) -> None:
    broken = changed(single, tmp_path / "m", lambda t: t.pop(QUERY))
    with pytest.raises(ValueError, match=f"lacks the tensor {QUERY}"):
        load_model(broken)


def test_extra_tensor(single: Path, tmp_path: Path) -> None:
    extra = {"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}
    broken = changed(single, tmp_path / "m", lambda t: t.update(extra))
    with pytest.raises(ValueError, match=r"has the tensor model\.layers\.9\.mlp\.up_proj\.weight"):
        load_model(broken)


def test_stored_rotary_frequencies_are_ignored(single: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    load_model(changed(single, tmp_path / "m", lambda t: t.update(extra)))


def test_wrong_shape(single: Path, tmp_path: Path) -> None:
    broken = changed(single, tmp_path / "m", lambda t: t.update({QUERY: torch.zeros(4, 48)}))
    with pytest.raises(ValueError, match=rf"{QUERY} has shape \[4, 48\], not \[128, 48\]"):
        load_model(broken)


def test_integer_tensor(single: Path, tmp_path: Path) -> None:
    broken = changed(single, tmp_path / "m", lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"tensor {QUERY} is I8"):
        load_model(broken)


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_truncated_safetensors(keep: float, single: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(single, tmp_path / "m")
    file = broken / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(ValueError, match=r"model\.safetensors is missing, damaged or truncated"):
        load_model(broken)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "has no usable weight_map"),
        ("{}", "has no usable weight_map"),
        ('{"weight_map": 3}', "has no usable weight_map"),
        ('{"weight_map": {"a": "b.safetensors"}}', "which is not in"),
        ('{"weight_map": {"a": "../m/model.safetensors"}}', "which is not in"),
        ('{"weight_map": {"a": "model.safetensors"}}', "which the index promises"),
    ],
)
def test_bad_index(text: str, sentence: str, single: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(single, tmp_path / "m")
    (broken / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_model(broken)


def test_truncated_gguf_anywhere(gguf_path: Path, tmp_path: Path) -> None:
    """Every cut ends in a ValueError, never in another exception or a wrong model."""
    data = gguf_path.read_bytes()
    cut = tmp_path / "cut.gguf"
    header = data.index(b"blk.0.attn_q.weight")
    for length in [*range(0, header, 97), header + 30, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            load_model(cut)


def read_all(path: Path) -> None:
    file = GgufFile(path)
    for name in file.tensors:
        file.dequantised(name)


def test_damaged_gguf_header_never_crashes(gguf_path: Path, tmp_path: Path) -> None:
    """Flipped bytes: a ValueError or a file that still reads, nothing else."""
    data = bytearray(gguf_path.read_bytes())
    generator = torch.Generator().manual_seed(3)
    for _ in range(150):
        at = int(torch.randint(0, 3000, (1,), generator=generator))
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        for read in (read_spec, load_tokenizer, read_all):
            with contextlib.suppress(ValueError):
                read(path)


def test_gguf_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for content in (b"", b"PK\x03\x04" + bytes(100), b"GGUF\x01\0\0\0" + bytes(64)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.gguf"):
            read_spec(path)


def test_gguf_without_a_tensor(gguf_path: Path, tmp_path: Path) -> None:
    data = gguf_path.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=rf"lacks the tensor {QUERY}"):
        load_model(tmp_path / "m.gguf")


def test_config_and_weights_that_disagree(single: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(single, tmp_path / "m")
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.3\.input_layernorm"):
        load_model(broken)
