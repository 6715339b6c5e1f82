"""A Llama small enough for any CPU, with random weights large enough that its answers vary."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

VOCABULARY = 320
CONTEXT_TOKENS = 1024
_HIDDEN, _INNER, _LAYERS, _HEADS, _KV_HEADS = 96, 192, 3, 6, 2
_HEAD = _HIDDEN // _HEADS


def write_model(folder: Path, seed: int) -> None:
    """config.json, model.safetensors and a tokenizer of one word an id."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "torch_dtype": "float32", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_size": _HIDDEN,
        "intermediate_size": _INNER, "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS, "num_key_value_heads": _KV_HEADS,
        "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT_TOKENS,
        "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(torch.Generator().manual_seed(seed)), folder / "model.safetensors")
    words = {f"t{number}": number for number in range(VOCABULARY)}
    Tokenizer(WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))


def _weights(draw: torch.Generator) -> dict[str, torch.Tensor]:
    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw).mul_(1.5 / math.sqrt(columns))

    def norm() -> torch.Tensor:
        return torch.rand(_HIDDEN, generator=draw) + 0.5

    found = {
        "model.embed_tokens.weight": matrix(VOCABULARY, _HIDDEN),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(VOCABULARY, _HIDDEN),
    }
    shapes = {
        "self_attn.q_proj": (_HEADS * _HEAD, _HIDDEN),
        "self_attn.k_proj": (_KV_HEADS * _HEAD, _HIDDEN),
        "self_attn.v_proj": (_KV_HEADS * _HEAD, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HEADS * _HEAD),
        "mlp.gate_proj": (_INNER, _HIDDEN),
        "mlp.up_proj": (_INNER, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INNER),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        for name, shape in shapes.items():
            found[f"{prefix}.{name}.weight"] = matrix(*shape)
        found[f"{prefix}.input_layernorm.weight"] = norm()
        found[f"{prefix}.post_attention_layernorm.weight"] = norm()
    return found
