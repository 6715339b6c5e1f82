"""Uniform draws that depend on (seed, position) alone: a counter-based hash, no generator state.

Integer arithmetic only until the last step, so the bits agree between CPU and CUDA.
"""

from __future__ import annotations

import torch

_BITS = 48
_GOLDEN = 0x9E3779B97F4A7C15


def signed(value: int) -> int:
    """`value` modulo 2^64 as torch's int64 holds it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`seeds`, `positions` [rows] int64 -> [rows] float64 strictly between 0 and 1.

    48 bits: the largest draw times a float64 sum then stays below that sum after rounding.
    """
    mixed = _mix(_mix(seeds) + (positions + 1) * signed(_GOLDEN))
    bits = _shift_right(mixed, 64 - _BITS)
    return (bits.to(torch.float64) + 0.5) * 2.0**-_BITS


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014); products wrap modulo 2^64."""
    z = (z ^ _shift_right(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical, where int64's own shift copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
