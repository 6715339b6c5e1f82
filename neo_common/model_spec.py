"""A model's shape and constants, free of torch: what any service may know of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. `scaling` is None, "linear", "llama3" or "yarn", whose factors follow."""

    theta: float
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: whether the ramp's ends are rounded to whole dimensions."""
    attention_factor: float = 1.0
    """Multiplies cos and sin (yarn)."""
    frequency_divisors: tuple[float, ...] = ()
    """One per frequency (head_dim / 2), GGUF's way to write llama3 scaling. Empty means none."""


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer of the families that we serve."""

    name: str
    family: str
    """"llama", "mistral", "qwen2" or "qwen3"."""
    layers: int
    hidden_size: int
    intermediate_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope: RopeSpec
    max_context_tokens: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sliding_window: tuple[int, ...]
    """Per layer, in tokens, the query itself included; 0 means the whole context."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    output_bias: bool = False
    """Whether attention's output projection has a bias."""
    dtype: str = "bfloat16"
    """The checkpoint's: "float32", "bfloat16" or "float16"; quantised files count as bfloat16."""
    quantization: str = ""
    """"fp8" where the checkpoint's layers are e4m3 with scales."""

    @property
    def queries_per_kv(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def attention_scale(self) -> float:
        """Factor on q . k before the softmax."""
        return 1.0 / math.sqrt(self.head_dim)

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """K and V of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes
