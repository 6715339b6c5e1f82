"""Random tiny models of every family and variant, written as Hugging Face directories.

    for name in VARIANTS: directory = tiny_model_dir(tmp_path / name, name)

The same directory serves `load_model` and the oracle, `reference_model(directory)`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpu_service.model.model import CausalLM

VOCAB = 320
EOS = 257

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 6}),
    "llama": ("llama", {"rope_theta": 500_000.0, "rope_scaling": _LLAMA3}),
    "llama-linear-tied": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True},
    ),
    "llama-bias-headdim": ("llama", {"attention_bias": True, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 24, "head_dim": 16}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("qwen2", {"rope_scaling": _YARN}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_attention_heads": 8}),
}
"""Name -> (family, what differs from the common small shape)."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""One variant of each family, for tests that need not see all of them."""

_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model_dir(
    directory: Path, variant: str, *, seed: int = 0, shard: str = "50GB", **overrides: Any
) -> Path:
    """A model of `VARIANTS[variant]` with large random weights, its tokenizer and chat template.

    shard: most bytes of one safetensors file, as in "20KB".
    """
    family, differences = VARIANTS[variant]
    config_class, model_class = _CLASSES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**{**_SMALL, **differences, **overrides}))
        _spread(model)
    model.save_pretrained(directory, max_shard_size=shard)
    write_tokenizer(directory)
    return directory


def _spread(model: torch.nn.Module) -> None:
    """Weights far larger than an initialised model's, so that attention, rope and biases matter."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)


def write_tokenizer(directory: Path) -> None:
    """One token a byte; ids 256 and 257 are <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def reference_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same model in `transformers`, with its eager attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def dense_logits(model: CausalLM, token_ids: list[int]) -> torch.Tensor:
    """`model`'s logits `[tokens, vocab]` at every position, with a plain causal attention."""
    positions = torch.arange(len(token_ids), device=model.device)
    state = model.embed(torch.tensor(token_ids, device=model.device))
    for layer in range(model.spec.layers):
        q, k, v = model.pre_projection(layer, state, positions)
        state = model.post_projection(layer, state, dense_attention(model, layer, q, k, v))
    return model.logits(state)


def dense_attention(
    model: CausalLM, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Causal attention of a whole sequence: `[tokens, query_heads, head_dim]`."""
    tokens, window = q.shape[0], model.spec.sliding_window[layer]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    seen = distance >= 0
    if window:
        seen &= distance < window
    k = k.repeat_interleave(model.spec.queries_per_kv, dim=1)
    v = v.repeat_interleave(model.spec.queries_per_kv, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * model.spec.attention_scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v)


@torch.inference_mode()
def reference_logits(reference: Any, token_ids: list[int]) -> torch.Tensor:
    """The oracle's logits `[tokens, vocab]` in fp32."""
    logits: torch.Tensor = reference(torch.tensor([token_ids])).logits[0].float()
    return logits


def greedy_tokens(reference: Any, prompt: list[int], count: int) -> list[int]:
    """The oracle's greedy continuation; end-of-sequence does not end it."""
    return list(_greedy(reference, prompt, count))


@torch.inference_mode()
def _greedy(reference: Any, prompt: list[int], count: int) -> Iterator[int]:
    past, tokens = None, torch.tensor([prompt])
    for _ in range(count):
        out = reference(tokens, past_key_values=past, use_cache=True)
        past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
        yield int(tokens)
