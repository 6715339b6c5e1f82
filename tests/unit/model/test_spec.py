"""Shapes from config.json and GGUF metadata, and the sentences for what is not supported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_service.model.spec import read_spec, resolve_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}


def write(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    config = {k: v for k, v in {**LLAMA, **changes}.items() if v != "absent"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_defaults_of_a_short_config(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path))
    assert (spec.kv_heads, spec.head_dim, spec.norm_eps) == (4, 16, 1e-6)
    assert (spec.rope.theta, spec.rope.scaling, spec.tied_embeddings) == (10_000.0, None, False)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.dtype) == (None, (), "bfloat16")
    assert spec.sliding_window == (0, 0, 0, 0)
    assert spec.name == tmp_path.name
    assert spec.kv_bytes_per_token(2) == 2 * 4 * 4 * 16 * 2


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (0,) * 4),
        ({"model_type": "mistral", "sliding_window": 8}, (8,) * 4),
        ({"model_type": "qwen2", "sliding_window": 8}, (0,) * 4),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            (0, 0, 0, 8),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            (0, 8, 0, 8),
        ),
        ({"model_type": "qwen2", "sliding_window": None, "use_sliding_window": True}, (0,) * 4),
    ],
)
def test_windows(changes: dict[str, Any], windows: tuple[int, ...], tmp_path: Path) -> None:
    assert read_spec(write(tmp_path, num_key_value_heads=2, **changes)).sliding_window == windows


@pytest.mark.parametrize(
    ("scaling", "context", "attention_factor"),
    [
        ({"type": "linear", "factor": 4.0}, 1024, 1.0),
        ({"rope_type": "yarn", "factor": 4.0}, 1024, 1.1386294361119891),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            256,
            1.0693147180559945,
        ),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}, 1024, 1.5),
        ({"rope_type": "llama3", "factor": 8.0}, 256, 1.0),
        ({"rope_type": "default"}, 256, 1.0),
    ],
)
def test_rope_scaling_and_context(
    scaling: dict[str, Any], context: int, attention_factor: float, tmp_path: Path
) -> None:
    spec = read_spec(write(tmp_path, rope_scaling=scaling))
    assert spec.max_context_tokens == context
    assert spec.rope.attention_factor == pytest.approx(attention_factor, abs=1e-12)


def test_end_of_sequence_ids_of_both_files(tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=5, bos_token_id=1)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5, 9]}')
    spec = read_spec(tmp_path)
    assert spec.eos_token_ids == (7, 5, 9)
    assert spec.bos_token_id == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported"),
        ({"model_type": "absent"}, "model_type '' is not supported"),
        ({"hidden_size": "absent"}, "hidden_size is None, not a positive integer"),
        ({"hidden_size": "64"}, "hidden_size is '64', not a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of 3 KV heads"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope scaling 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor -1"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', not an object"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', not a number"),
        ({"quantization_config": {"bits": 4}}, "quant_method None is not supported"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not of type bool"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types does not name each of the 4 layers",
        ),
    ],
)
def test_unsupported_configs(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: ") as caught:
        read_spec(write(tmp_path, **changes))
    assert sentence in str(caught.value)


def test_damaged_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold a JSON object"):
        read_spec(tmp_path)


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        resolve_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"neither config.json nor a single \.gguf file"):
        resolve_model(tmp_path)
    text = tmp_path / "notes.txt"
    text.touch()
    with pytest.raises(ValueError, match=r"neither a directory nor a \.gguf file"):
        resolve_model(text)
    (tmp_path / "one.gguf").touch()
    assert resolve_model(tmp_path) == tmp_path / "one.gguf"
    directory = write(tmp_path / "hf")
    assert resolve_model(directory / "config.json") == directory


def test_the_packaged_model() -> None:
    spec = read_spec("smollm2")
    assert (spec.family, spec.layers, spec.query_heads, spec.kv_heads) == ("llama", 30, 9, 3)
    assert (spec.head_dim, spec.vocab_size, spec.tied_embeddings) == (64, 49_152, True)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.dtype) == (1, (2,), "bfloat16")


def test_front_end_modules_import_no_torch() -> None:
    code = (
        "import sys; import gpu_service.model.tokenizer as t; t.load_tokenizer('smollm2');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'llama_cpp')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
