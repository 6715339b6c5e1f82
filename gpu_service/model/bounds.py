"""What a model's shape may be at most: a damaged file's numbers must become neither memory nor
time, nor NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from neo_common.model_spec import ModelSpec, RopeSpec

MAX_LAYERS = 1024
MAX_SIZE = 1 << 24
"""Of a hidden layer, of a vocabulary."""
MAX_HEADS = 4096
MAX_CONTEXT = 2**31 - 1
LARGEST = 1e15
"""Absolute value of a setting that is a real number."""
_SHOWN = 80


def shown(value: Any) -> str:
    """A file's value, for an error."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def checked(spec: ModelSpec, where: Path) -> ModelSpec:
    """`spec`, or a ValueError naming what no model has."""
    limits = {
        "layers": MAX_LAYERS,
        "hidden_size": MAX_SIZE,
        "intermediate_size": MAX_SIZE,
        "query_heads": MAX_HEADS,
        "kv_heads": MAX_HEADS,
        "head_dim": MAX_HEADS,
        "vocab_size": MAX_SIZE,
        "max_context_tokens": MAX_CONTEXT,
    }
    for name, most in limits.items():
        value = getattr(spec, name)
        if not 1 <= value <= most:
            raise ValueError(f"{where}: {name} is {shown(value)}, not 1 to {most}")
    if spec.head_dim % 2:
        raise ValueError(f"{where}: head_dim {spec.head_dim} is odd")
    if not 0 <= spec.norm_eps < 1:
        raise ValueError(f"{where}: norm_eps is {spec.norm_eps}, not between 0 and 1")
    if not 0 <= max(spec.sliding_window) <= MAX_CONTEXT:
        raise ValueError(f"{where}: a sliding window of {shown(max(spec.sliding_window))} tokens")
    for token in (*spec.eos_token_ids, *((spec.bos_token_id,) if spec.bos_token_id else ())):
        if not 0 <= token < spec.vocab_size:
            raise ValueError(
                f"{where}: the special token {shown(token)} is not one of {spec.vocab_size}"
            )
    _check_rope(spec.rope, where)
    return spec


def _check_rope(rope: RopeSpec, where: Path) -> None:
    names = ["theta", "factor", "attention_factor"]
    if rope.scaling == "llama3":
        names += ["original_context", "low_freq_factor", "high_freq_factor"]
        if rope.low_freq_factor >= rope.high_freq_factor:
            raise ValueError(f"{where}: low_freq_factor is not below high_freq_factor")
    if rope.scaling == "yarn":
        names += ["original_context", "beta_fast", "beta_slow"]
    for name in names:
        value = getattr(rope, name)
        if not 1 / LARGEST <= value <= LARGEST:
            raise ValueError(f"{where}: {name} of the rotary embedding is {shown(value)}")
    if rope.theta <= 1:
        raise ValueError(f"{where}: theta of the rotary embedding is {rope.theta}, not above 1")
    if not all(math.isfinite(each) and each > 0 for each in rope.frequency_divisors):
        raise ValueError(f"{where}: the rotary embedding's frequency divisors are not above 0")
