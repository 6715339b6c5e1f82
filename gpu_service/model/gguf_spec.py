"""ModelSpec from GGUF metadata (llama.cpp's key names)."""

from __future__ import annotations

from typing import Any

from gpu_service.model.bounds import LARGEST, MAX_CONTEXT, MAX_LAYERS, checked, shown
from gpu_service.model.gguf_file import GgufFile
from gpu_service.model.hf_spec import yarn_magnitude
from neo_common.model_spec import ModelSpec, RopeSpec

# Mistral models are written as "llama"; the tensors and the mathematics are the same.
FAMILIES = ("llama", "qwen2", "qwen3")
_GGML_F32, _GGML_F16 = 0, 1


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    keys = _Keys(file)
    family = keys.architecture
    layers = keys.count("block_count", most=MAX_LAYERS)
    heads = keys.count("attention.head_count")
    hidden = keys.count("embedding_length")
    kv_heads = keys.count("attention.head_count_kv", heads)
    head_dim = keys.count("attention.key_length", hidden // heads)
    _refuse_unsupported(keys, head_dim)
    if heads % kv_heads:
        raise ValueError(
            f"{file.path}: {heads} query heads are not a multiple of {kv_heads} KV heads"
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight")
    down = file.tensors.get("blk.0.ffn_down.weight")
    stored = {_GGML_F32: "float32", _GGML_F16: "float16"}
    spec = ModelSpec(
        name=str(file.metadata.get("general.name") or file.path.stem),
        family=family,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=keys.count("feed_forward_length"),
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope=_rope(keys),
        max_context_tokens=keys.count("context_length"),
        tied_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=(keys.count("attention.sliding_window", 0),) * layers,
        bos_token_id=keys.token_id("bos"),
        eos_token_ids=tuple(
            dict.fromkeys(i for i in map(keys.token_id, ("eos", "eot", "eom")) if i is not None)
        ),
        dtype=stored.get(down.ggml_type, "bfloat16") if down else "bfloat16",
    )
    return checked(spec, file.path)


class _Keys:
    """The metadata of one architecture, with errors that name the key."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture", ""))
        if self.architecture not in FAMILIES:
            raise ValueError(
                f"{file.path}: architecture {shown(self.architecture)} is not supported"
                f" ({', '.join(FAMILIES)} are)"
            )

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None, most: int = MAX_CONTEXT) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(
                f"{self.file.path}: {self.architecture}.{key} is {shown(value)}, not a count of at "
                f"most {most}"
            )
        if value == 0 and default != 0:
            raise ValueError(f"{self.file.path}: {self.architecture}.{key} is 0")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        if value is None:
            return default
        sane = isinstance(value, int | float) and not isinstance(value, bool)
        if not sane or not abs(value) <= LARGEST:
            raise ValueError(
                f"{self.file.path}: {self.architecture}.{key} is {shown(value)}, not a number"
            )
        return float(value)

    def token_id(self, kind: str) -> int | None:
        value = self.file.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def _refuse_unsupported(keys: _Keys, head_dim: int) -> None:
    where = keys.file.path
    if keys.count("expert_count", 0):
        raise ValueError(f"{where}: mixtures of experts are not supported")
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{where}: keys and values of different sizes are not supported")
    if keys.count("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{where}: rotary embeddings of part of a head are not supported")


def _rope(keys: _Keys) -> RopeSpec:
    theta = keys.number("rope.freq_base", 10_000.0)
    divisors: tuple[float, ...] = ()
    if "rope_freqs.weight" in keys.file.tensors:
        divisors = tuple(map(float, keys.file.dequantised("rope_freqs.weight").ravel()))
    kind = keys.get("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind == "none" or (kind in (None, "linear") and factor == 1.0):
        return RopeSpec(theta=theta, frequency_divisors=divisors)
    if kind in (None, "linear"):
        return RopeSpec(theta=theta, scaling="linear", factor=factor, frequency_divisors=divisors)
    if kind == "yarn":
        return RopeSpec(
            theta=theta,
            scaling="yarn",
            factor=factor,
            original_context=keys.count("rope.scaling.original_context_length"),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=keys.number("rope.scaling.attn_factor", yarn_magnitude(factor, 1.0)),
            frequency_divisors=divisors,
        )
    raise ValueError(
        f"{keys.file.path}: rope scaling {shown(kind)} is not supported (linear, yarn are)"
    )
