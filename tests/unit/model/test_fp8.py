"""fp8 weights: the layer's arithmetic against fp64, checkpoints in every form, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

from gpu_service.model import fp8, weights
from gpu_service.model.model import load_model
from gpu_service.model.spec import read_spec
from tests.support import models
from tests.support.fp8 import check_quantise, fake_quantised, fp8_reference, rows_of_all_kinds
from tests.support.mutants import mutated

PROMPT = [(11 * i) % models.VOCAB for i in range(40)]
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token"},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
}
TENSORS = {"quant_method": "fp8", "activation_scheme": "static"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    return models.tiny_model_dir(directory, "llama-bias-headdim", intermediate_size=112)


def quantised_copy(
    source: Path, target: Path, quantization: dict[str, Any], *, head: bool = False
) -> Path:
    """A checkpoint as others write them: scales per channel in bf16, or one a tensor."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not (name.endswith("_proj.weight") or (head and name == weights.HEAD)):
            stored[name] = tensor
            continue
        base = name.removesuffix("weight")
        scale = tensor.abs().amax(-1, keepdim=True) / 448
        if quantization is TENSORS:
            scale = scale.max()
            stored[f"{base}input_scale"] = torch.ones(1)
        else:
            scale = scale.bfloat16()
        stored[name] = (tensor / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[f"{base}weight_scale"] = scale
    safetensors.torch.save_file(stored, target / "model.safetensors")
    return target


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(source, target)
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, target / "model.safetensors")
    return target


def dequantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[name.removesuffix("weight") + "weight_scale"].float()
            found[name] = tensor.float() * scale.view(-1, 1)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_rows(dtype: torch.dtype) -> None:
    def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = fp8.quantised_rows(x)
        return rows.codes, rows.scales

    check_quantise(quantise, rows_of_all_kinds(1000, dtype, "cpu"))


def check_linear(module: ModuleType, dtype: torch.dtype, *, bias: bool) -> None:
    """Against fp64 on the same codes, and at most twice as wrong as torch's own product of them."""
    torch.manual_seed(1)
    weight, x = torch.randn(48, 160) * 0.02, (torch.randn(5, 160) * 3).to(dtype)
    added = torch.randn(48).to(dtype) if bias else None
    quantised = module.Fp8Rows.empty(48, 160, torch.device("cpu"))
    module.quantise_weight(weight, quantised)
    ours = module.Fp8Linear(quantised, dtype, added)(x)
    w, codes = fake_quantised(weight.double()), fake_quantised(x.double())
    shift = torch.zeros(48).double() if added is None else added.double()
    truth = codes @ w.T + shift
    theirs = (codes.to(dtype) @ w.to(dtype).T).double() + shift
    error, allowed = (ours.double() - truth).norm(), (theirs - truth).norm()
    assert ours.dtype == dtype
    assert error <= 2 * allowed + 2e-6 * truth.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear(dtype: torch.dtype, bias: bool) -> None:
    check_linear(fp8, dtype, bias=bias)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kept * (1.0 / _LARGEST)", "kept * (1.0 / 440.0)"),
        ("(wide.masked_fill(~finite, 0.0) *", "(wide.clamp(-2.0, 2.0) *"),
        (".amax(-1, keepdim=True)", ".amax().expand(wide.shape[0], 1)"),
        (".mul_(x.scales[:, None])", ""),
        (".mul_(self._scales)", ".mul_(self._scales[0])"),
        ("product.add_(self._bias)", "product"),
        ("weight[start:end].to(", "weight[:end - start].to("),
    ],
)
def test_mutants_fail(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutated(fp8, old, new, tmp_path)
    monkeypatch.setattr(mutant, "_CHUNK_ELEMENTS", 160 * 7)
    with pytest.raises(AssertionError):
        check_linear(mutant, torch.float32, bias=True)


def test_weights_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_CHUNK_ELEMENTS", 160 * 7)
    check_linear(fp8, torch.float32, bias=True)


@pytest.mark.parametrize("name", ["llama2", "llama-bias-headdim", "qwen3", "mistral"])
def test_logits_are_those_of_a_quantised_transformers(name: str, tmp_path: Path) -> None:
    directory = models.tiny_model_dir(tmp_path, name, head_dim=16)
    ours = models.dense_logits(load_model(directory, quantization="fp8"), PROMPT)
    check_logits(ours, fp8_reference(directory), models.reference_model(directory))


def check_logits(ours: torch.Tensor, exact: Any, plain: Any) -> None:
    """Exact until the first code that lies on a tie and falls to the other side, which is 6% off;
    at all positions far nearer to fp8 by the book than that is to plain fp32."""
    truth = models.reference_logits(exact, PROMPT)
    error = (ours - truth).norm(dim=-1) / truth.norm(dim=-1)
    shift = (models.reference_logits(plain, PROMPT) - truth).norm(dim=-1) / truth.norm(dim=-1)
    assert error.min() < 1e-5
    assert shift.mean() > 0.1, "fp8 should be visible"
    assert error.mean() < 0.5 * shift.mean()


@pytest.mark.parametrize("kind", [CHANNELS, TENSORS], ids=["channels", "tensors"])
@pytest.mark.parametrize("head", [False, True])
def test_checkpoints(kind: dict[str, Any], head: bool, plain: Path, tmp_path: Path) -> None:
    """Codes as they are stored, with a bf16 copy's scales; an fp8 head is dequantised."""
    directory = quantised_copy(plain, tmp_path / "m", kind, head=head)
    assert read_spec(directory).quantization == "fp8"
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    wanted = changed(plain, tmp_path / "w", lambda t: t.update(dequantised(tensors)))
    source = weights.SafetensorsSource(directory, fp8=True)
    for name, values in dequantised(tensors).items():
        rows = fp8.Fp8Rows.empty(*values.shape, torch.device("cpu"))
        source.read_fp8(name, rows)
        torch.testing.assert_close(rows.values(), values, rtol=1e-6, atol=0)
        torch.testing.assert_close(source.read(name), values, rtol=1e-6, atol=0)
    exact = fp8_reference(wanted, weights_too=False)
    ours = models.dense_logits(load_model(directory), PROMPT)
    check_logits(ours, exact, models.reference_model(plain))


def test_layers_that_a_checkpoint_leaves_plain_are_quantised(plain: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    original = safetensors.torch.load_file(plain / "model.safetensors")[name]
    partly = quantised_copy(plain, tmp_path / "m", CHANNELS)

    def put_back(tensors: dict[str, Any]) -> None:
        tensors[name] = original
        del tensors[name + "_scale"]

    source = weights.SafetensorsSource(changed(partly, tmp_path / "n", put_back), fp8=True)
    rows = fp8.Fp8Rows.empty(*original.shape, torch.device("cpu"))
    source.read_fp8(name, rows)
    torch.testing.assert_close(rows.values(), fake_quantised(original), rtol=0.07, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' is not supported"),
        (TENSORS | {"weight_block_size": [128, 128]}, "a scale per block are not supported"),
        (CHANNELS | {"format": "pack-quantized"}, "format 'pack-quantized' are not supported"),
        (CHANNELS | {"config_groups": {}}, "no config_groups"),
        (CHANNELS | {"config_groups": {"a": {}}}, "a group without weights"),
        (CHANNELS | {"config_groups": {"a": {"weights": {"num_bits": 4}}}}, "num_bits is 4"),
    ],
)
def test_other_methods_are_refused(
    changes: dict[str, Any], sentence: str, plain: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(plain, tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = changes
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: .*" + sentence):
        read_spec(directory)


SCALE = "model.layers.1.mlp.down_proj.weight_scale"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(SCALE), f"lacks the tensor {SCALE}"),
        (lambda t: t.update({SCALE: torch.ones(3, 2)}), rf"{SCALE} has shape \[3, 2\]; one value"),
        (lambda t: t.pop(SCALE.removesuffix("_scale")), "lacks the tensor model.layers.1.mlp.down"),
    ],
)
def test_damaged_checkpoints(
    change: Callable[[dict[str, Any]], object], sentence: str, plain: Path, tmp_path: Path
) -> None:
    good = quantised_copy(plain, tmp_path / "m", CHANNELS)
    with pytest.raises(ValueError, match=sentence):
        load_model(changed(good, tmp_path / "n", change))


def test_e4m3_without_a_quantization_config(plain: Path, tmp_path: Path) -> None:
    odd = quantised_copy(plain, tmp_path / "m", {})
    with pytest.raises(ValueError, match=r"F8_E4M3 where config\.json has"):
        load_model(odd)


def test_dummy_weights(plain: Path, tmp_path: Path) -> None:
    shutil.copy(plain / "config.json", tmp_path)
    first, second = (
        load_model(tmp_path, load_format="dummy", quantization="fp8") for _ in range(2)
    )
    logits = models.dense_logits(first, PROMPT)
    assert torch.equal(logits, models.dense_logits(second, PROMPT))
    assert logits.isfinite().all()
    rows = fp8.Fp8Rows.empty(64, 500, torch.device("cpu"))
    fp8.random_weight(rows, 3, 0.02)
    assert rows.values().std() == pytest.approx(0.02, rel=0.02)
    assert rows.values().mean().abs() < 1e-3


def test_shapes_that_the_product_cannot_take(tmp_path: Path) -> None:
    directory = models.tiny_model_dir(tmp_path, "llama2", intermediate_size=100)
    with pytest.raises(ValueError, match=r"intermediate_size to be a multiple of 16, .* is 100"):
        load_model(directory, quantization="fp8")


def test_bytes(plain: Path) -> None:
    """Progress ends at what the weights take: 1 byte each in layers, and 4 a channel."""
    calls: list[tuple[str, int, int]] = []
    load_model(
        plain, dtype="bfloat16", quantization="fp8", progress=lambda *call: calls.append(call)
    )
    expected = 0
    for name, tensor in models.reference_model(plain).state_dict().items():
        layer = name.endswith("_proj.weight")
        expected += tensor.numel() + 4 * tensor.shape[0] if layer else 2 * tensor.numel()
    assert calls[-1][1:] == (expected, expected)


def test_other_dtypes_are_refused_on_cuda(plain: Path) -> None:
    with pytest.raises(ValueError, match=r"need dtype bfloat16, not torch\.float16"):
        load_model(plain, dtype="float16", quantization="fp8", device="cuda")


def test_weights_that_do_not_fit(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is read, with the bytes of both kinds."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64 << 10, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ValueError, match=r"weights take .* GiB free; with quantization fp8 they"):
        load_model(plain, device="cuda")
    with pytest.raises(ValueError, match=r"weights take .* GiB free$"):
        load_model(plain, dtype="bfloat16", device="cuda", quantization="fp8")


def test_older_devices_are_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    with pytest.raises(ValueError, match="Some GPU cannot multiply fp8 weights"):
        load_model(plain, dtype="bfloat16", device="cuda", quantization="fp8")
