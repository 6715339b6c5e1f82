"""The tiny models of `tests.support.models` as GGUF files, written with the `gguf` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from gpu_service.model.rope import inverse_frequencies
from gpu_service.model.spec import read_spec
from neo_common.model_spec import ModelSpec, RopeSpec
from tests.support import models

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Overrides that make rows whole blocks of 32."""


def write_gguf(directory: Path, variant: str, kind: str = "F32") -> Path:
    """`variant` as `directory/model.gguf`, with its twin in Hugging Face form in `directory/hf`.

    kind: how matrices are stored; the twin keeps the unquantised values.
    """
    twin = models.tiny_model_dir(directory / "hf", variant, **SHAPE)
    spec = read_spec(twin)
    architecture = "llama" if spec.family == "mistral" else spec.family
    writer = gguf.GGUFWriter(directory / "model.gguf", architecture)
    _write_shape(writer, spec)
    _write_tokenizer(writer)
    for name, tensor in models.reference_model(twin).state_dict().items():
        if name == "lm_head.weight" and spec.tied_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture == "llama":
            values = permuted(values, name, spec)
        stored = kind if values.ndim == 2 else "F32"
        _write_tensor(writer, gguf_name(name), values, gguf.GGMLQuantizationType[stored])
    if spec.rope.scaling == "llama3":
        plain = inverse_frequencies(RopeSpec(theta=spec.rope.theta), spec.head_dim)
        scaled = inverse_frequencies(spec.rope, spec.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / "model.gguf"


def permuted(values: npt.NDArray[Any], name: str, spec: ModelSpec) -> npt.NDArray[Any]:
    """llama.cpp's order of Q and K rows: halves become neighbours."""
    heads = {"q_proj": spec.query_heads, "k_proj": spec.kv_heads}.get(name.split(".")[-2])
    if not heads:
        return values
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def gguf_name(name: str) -> str:
    """llama.cpp's name by the library's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 8)
    stem, _, suffix = name.rpartition(".")
    found = table.get_name(stem)
    assert found is not None, name
    return f"{found}.{suffix}"


def _write_shape(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    writer.add_context_length(spec.max_context_tokens)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.query_heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    if spec.rope.scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(spec.rope.scaling))
        writer.add_rope_scaling_factor(spec.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(spec.rope.original_context or 1)
    if any(spec.sliding_window):
        writer.add_sliding_window(max(spec.sliding_window))


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = [*sorted(ByteLevel.alphabet()), "<s>", "</s>", "th"]
    tokens += [f"<unused{i}>" for i in range(models.VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3] + [1] * (models.VOCAB - 258))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(models.EOS)
    writer.add_chat_template(models.CHAT_TEMPLATE)


def _write_tensor(
    writer: gguf.GGUFWriter, name: str, values: npt.NDArray[Any], kind: gguf.GGMLQuantizationType
) -> None:
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values.astype(np.float32))
    elif kind == gguf.GGMLQuantizationType.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def reference_from_gguf(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The file as `transformers` reads it, dequantised."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        attn_implementation="eager",
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()
