"""Rotary position embedding: frequencies of every scaling we serve, and cos/sin as one table.

Frequencies follow the papers and `transformers` (`modeling_rope_utils.py`) to the bit in fp32,
since positions multiply every error in them.
"""

from __future__ import annotations

import math

import torch

from neo_common.model_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions: `[head_dim / 2]` fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    if rope.scaling == "yarn":
        plain = _yarn(rope, head_dim, rope.theta**exponents)
    else:
        plain = 1.0 / (rope.theta**exponents)
    if rope.scaling == "linear":
        plain = plain / rope.factor
    elif rope.scaling == "llama3":
        plain = _llama3(rope, plain)
    if rope.frequency_divisors:
        divisors = torch.tensor(rope.frequency_divisors, dtype=torch.float32)
        if divisors.shape != plain.shape:
            raise ValueError(f"rope has {len(divisors)} frequency divisors, not {len(plain)}")
        plain = plain / divisors
    return plain


def rope_table(
    rope: RopeSpec, head_dim: int, positions: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`[positions, 2, head_dim]`: cos and signed sin of every position.

    The two halves of a head rotate against each other, `out = x * cos + swapped(x) * sin`, where
    `swapped` exchanges the halves and the first half of `sin` carries the minus sign.
    """
    frequencies = inverse_frequencies(rope, head_dim)
    table = torch.empty(positions, 2, head_dim, dtype=dtype, device=device)
    chunk = 1 << 14
    for start in range(0, positions, chunk):
        end = min(start + chunk, positions)
        angles = torch.arange(start, end, dtype=torch.float32)[:, None] * frequencies
        cos = angles.cos() * rope.attention_factor
        sin = angles.sin() * rope.attention_factor
        table[start:end, 0] = torch.cat((cos, cos), dim=-1).to(dtype)
        table[start:end, 1] = torch.cat((-sin, sin), dim=-1).to(dtype)
    return table


def _llama3(rope: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    longest = rope.original_context / rope.low_freq_factor
    shortest = rope.original_context / rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > longest, plain / rope.factor, plain)
    blend = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    between = (wavelength >= shortest) & (wavelength <= longest)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeSpec, head_dim: int, powers: torch.Tensor) -> torch.Tensor:
    """Dimensions that turn often are kept, those that turn rarely stretched, a ramp between."""

    def dimension(turns: float) -> float:
        span = math.log(rope.original_context / (turns * 2 * math.pi))
        return head_dim * span / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep
