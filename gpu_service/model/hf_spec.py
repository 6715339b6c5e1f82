"""ModelSpec from a Hugging Face directory: config.json and generation_config.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

from gpu_service.model.bounds import LARGEST, MAX_CONTEXT, MAX_LAYERS, checked, shown
from gpu_service.model.hf_quantization import quantization_of
from neo_common.documents import from_json
from neo_common.model_spec import ModelSpec, RopeSpec

T = TypeVar("T")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT_WINDOW = 4096


def spec_from_directory(directory: Path) -> ModelSpec:
    config = _Config(_read_json(directory / "config.json"), directory / "config.json")
    family = config.get("model_type", str, "")
    if family not in FAMILIES:
        raise ValueError(
            f"{config.where}: model_type {family!r} is not supported ({', '.join(FAMILIES)} are)"
        )
    _refuse_unsupported(config)
    layers = config.count("num_hidden_layers", most=MAX_LAYERS)
    hidden = config.count("hidden_size")
    heads = config.count("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", 8 if family == "mistral" else heads)
    head_dim = config.count("head_dim", 128 if family == "qwen3" else hidden // heads)
    if heads % kv_heads:
        raise ValueError(
            f"{config.where}: num_attention_heads {heads} is not a multiple of {kv_heads} KV heads"
        )
    rope, context = _rope(config)
    biased = config.get("attention_bias", bool, False) and family in ("llama", "qwen3")
    generation = directory / "generation_config.json"
    extra_eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    spec = ModelSpec(
        name=directory.resolve().name,
        family=family,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=config.count("intermediate_size"),
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config.count("vocab_size"),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_context_tokens=context,
        tied_embeddings=config.get("tie_word_embeddings", bool, False),
        qkv_bias=biased or family == "qwen2",
        output_bias=biased,
        qk_norm=family == "qwen3",
        sliding_window=_windows(config, family, layers),
        bos_token_id=next(iter(config.token_ids("bos_token_id")), None),
        eos_token_ids=_merge(_ids(extra_eos), config.token_ids("eos_token_id")),
        dtype=_dtype(config),
        quantization=quantization_of(config.values.get("quantization_config"), config.where),
    )
    return checked(spec, config.where)


class _Config:
    """config.json with errors that name the key."""

    def __init__(self, values: dict[str, Any], where: Path) -> None:
        self.values = values
        self.where = where

    def get(self, key: str, kind: type[T], default: T) -> T:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise ValueError(f"{self.where}: {key} is {shown(value)}, not of type {kind.__name__}")
        return value

    def count(self, key: str, default: int | None = None, most: int = MAX_CONTEXT) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{self.where}: {key} is {shown(value)}, not a positive integer")
        if value > most:
            raise ValueError(f"{self.where}: {key} is {shown(value)}, more than {most}")
        return value

    def number(self, key: str, default: float) -> float:
        return _number(self.values.get(key, default), key, self.where)

    def token_ids(self, key: str) -> tuple[int, ...]:
        return _ids(self.values.get(key))


def _refuse_unsupported(config: _Config) -> None:
    activation = config.get("hidden_act", str, "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"{config.where}: hidden_act {activation!r} is not supported (silu is)")
    if config.get("mlp_bias", bool, False):
        raise ValueError(f"{config.where}: mlp_bias is not supported")


def _rope(config: _Config) -> tuple[RopeSpec, int]:
    """The rotary embedding and the longest context it allows."""
    context = config.count("max_position_embeddings")
    values = config.values.get("rope_scaling") or config.values.get("rope_parameters") or {}
    if not isinstance(values, dict):
        raise ValueError(f"{config.where}: rope_scaling is {shown(values)}, not an object")
    scaling = _Config(values, config.where)
    theta = scaling.number("rope_theta", config.number("rope_theta", 10_000.0))
    partial = scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"{config.where}: partial_rotary_factor {partial} is not supported")
    kind = scaling.get("rope_type", str, scaling.get("type", str, "default"))
    if kind == "default":
        return RopeSpec(theta=theta), context
    factor = scaling.number("factor", 1.0)
    if factor <= 0:
        raise ValueError(f"{config.where}: rope scaling has factor {factor}")
    if kind == "linear":
        return RopeSpec(theta=theta, scaling="linear", factor=factor), int(context * factor)
    original = scaling.count(
        "original_max_position_embeddings",
        config.count("original_max_position_embeddings", context),
    )
    if kind == "llama3":
        rope = RopeSpec(
            theta=theta,
            scaling="llama3",
            factor=factor,
            low_freq_factor=scaling.number("low_freq_factor", 1.0),
            high_freq_factor=scaling.number("high_freq_factor", 4.0),
            original_context=original,
        )
        return rope, context
    if kind == "yarn":
        return _yarn(scaling, theta, factor, original), max(context, int(original * factor))
    raise ValueError(
        f"{config.where}: rope scaling {kind!r} is not supported (linear, llama3 and yarn are)"
    )


def _yarn(scaling: _Config, theta: float, factor: float, original: int) -> RopeSpec:
    mscale, mscale_all = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    if scaling.values.get("attention_factor") is not None:
        attention = scaling.number("attention_factor", 1.0)
    elif mscale and mscale_all:
        whole = yarn_magnitude(factor, mscale_all)
        if not whole:
            raise ValueError(f"{scaling.where}: mscale_all_dim {mscale_all} makes it 0")
        attention = yarn_magnitude(factor, mscale) / whole
    else:
        attention = yarn_magnitude(factor, 1.0)
    return RopeSpec(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_context=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.get("truncate", bool, True),
        attention_factor=attention,
    )


def yarn_magnitude(factor: float, mscale: float) -> float:
    """Factor on cos and sin when yarn stretches the context by `factor` (arXiv 2309.00071)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _windows(config: _Config, family: str, layers: int) -> tuple[int, ...]:
    """Mistral: one for all layers. Qwen: from layer `max_window_layers` on, if switched on."""
    if family == "mistral":
        window = config.values.get("sliding_window", _DEFAULT_WINDOW)
        return (0 if window is None else config.count("sliding_window", _DEFAULT_WINDOW),) * layers
    if family == "llama" or not config.get("use_sliding_window", bool, False):
        return (0,) * layers
    if "sliding_window" in config.values and config.values["sliding_window"] is None:
        return (0,) * layers
    window = config.count("sliding_window", _DEFAULT_WINDOW)
    kinds = config.values.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", int, 28)
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(f"{config.where}: layer_types does not name each of the {layers} layers")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(f"{config.where}: layer type {kind!r} is not supported")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _dtype(config: _Config) -> str:
    name = config.get("dtype", str, config.get("torch_dtype", str, "bfloat16"))
    name = name.removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"{config.where}: dtype {name!r} is not supported ({', '.join(_DTYPES)})")
    return name


def _number(value: Any, key: str, where: Path) -> float:
    sane = isinstance(value, int | float) and not isinstance(value, bool)
    if not sane or not abs(value) <= LARGEST:
        raise ValueError(f"{where}: {key} is {shown(value)}, not a number of a model")
    return float(value)


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _merge(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(first + second))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value
