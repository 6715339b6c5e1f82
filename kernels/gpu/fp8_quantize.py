"""Rows of activations as e4m3 codes with a scale each, alone or behind the step that makes them.

    scale = max(largest |x| of the row, 2^-60) / 448        x ~ code * scale

A row of zeros becomes zeros. A row with NaN or infinity gets the scale NaN, so that all that is
computed from it is NaN, too. What comes before is rounded to x's dtype first, so that fused and
separate forms give the same codes. One program a row: its largest value is known to nobody else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.tensors import FLOATS, INTERPRET, check

E4M3 = torch.float8_e4m3fn
MOST_WIDTH = 32768
_LARGEST: tl.constexpr = tl.constexpr(448.0)
_SMALLEST: tl.constexpr = tl.constexpr(2.0**-60)


@triton.jit
def _e4m3_bits(x, BY_HAND: tl.constexpr):
    """uint8 codes of fp32 values within +-448, rounded to nearest, ties to even."""
    if BY_HAND:
        size = tl.abs(x)
        exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
        # Adding 2^23 leaves no bits behind the point: fp32 rounds as we want.
        steps = size * tl.exp2((3 - exponent).to(tl.float32)) + 8388608.0 - 8388608.0
        code = (exponent + 6) * 8 + steps.to(tl.int32)
        bits = tl.where(x < 0, code + 128, code).to(tl.uint8)
    else:
        bits = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return bits


@triton.jit
def _store_row(x, row, codes_ptr, scales_ptr, at, ok, WIDTH: tl.constexpr, BY_HAND: tl.constexpr):
    """x: fp32, 0 where `at` is beyond the row."""
    finite = tl.abs(x) < float("inf")
    largest = tl.max(tl.where(finite, tl.abs(x), float("inf")), 0)
    kept = tl.maximum(largest, _SMALLEST)
    # Exact division: where it is a power of two, many quotients of 16-bit values are ties.
    codes = tl.where(finite, x, 0.0) * tl.div_rn(_LARGEST, kept)
    codes = tl.minimum(tl.maximum(codes, -_LARGEST), _LARGEST)
    tl.store(codes_ptr + row * WIDTH + at, _e4m3_bits(codes, BY_HAND), mask=ok)
    scale = tl.where(largest < float("inf"), kept * (1.0 / _LARGEST), float("nan"))
    tl.store(scales_ptr + row, scale)


@triton.jit
def _quantise_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH_PAD)
    ok = at < WIDTH
    x = tl.load(x_ptr + row * WIDTH + at, mask=ok, other=0.0).to(tl.float32)
    _store_row(x, row, codes_ptr, scales_ptr, at, ok, WIDTH, BY_HAND)


@triton.jit
def _add_rms_norm_quantise_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    eps,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH_PAD)
    ok = at < WIDTH
    place = row * WIDTH + at
    x = tl.load(x_ptr + place, mask=ok, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total = x + tl.load(residual_ptr + place, mask=ok, other=0.0).to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + place, rounded, mask=ok)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + at, mask=ok, other=0.0).to(tl.float32)
    normed = (x * scale * weight).to(x_ptr.dtype.element_ty).to(tl.float32)
    _store_row(normed, row, codes_ptr, scales_ptr, at, ok, WIDTH, BY_HAND)


@triton.jit
def _silu_mul_quantise_kernel(
    gate_up_ptr,
    codes_ptr,
    scales_ptr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH_PAD)
    ok = at < WIDTH
    place = row * 2 * WIDTH + at
    gate = tl.load(gate_up_ptr + place, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + place + WIDTH, mask=ok, other=0.0).to(tl.float32)
    product = (gate * tl.sigmoid(gate) * up).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    _store_row(product, row, codes_ptr, scales_ptr, at, ok, WIDTH, BY_HAND)


def quantise_rows(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """x, codes (e4m3): `[rows, width]`, width at most 32768. scales (fp32): `[rows]`."""
    rows, width = x.shape
    check("x", x, (-1, -1), *FLOATS)
    _check_out(codes, scales, rows, width)
    _quantise_kernel[(rows,)](
        x,
        codes.view(torch.uint8),
        scales,
        WIDTH=width,
        WIDTH_PAD=triton.next_power_of_2(width),
        BY_HAND=INTERPRET,
        num_warps=_warps(width),
    )


def add_rms_norm_quantise(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    eps: float,
) -> None:
    """`kernels.gpu.rms_norm.add_rms_norm`, whose result is quantised instead of stored."""
    rows, width = x.shape
    check("x", x, (-1, -1), *FLOATS)
    check("weight", weight, (width,), x.dtype)
    if residual is not None:
        check("residual", residual, x.shape, x.dtype)
    _check_out(codes, scales, rows, width)
    _add_rms_norm_quantise_kernel[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        codes.view(torch.uint8),
        scales,
        eps,
        WIDTH=width,
        WIDTH_PAD=triton.next_power_of_2(width),
        HAS_RESIDUAL=residual is not None,
        BY_HAND=INTERPRET,
        num_warps=_warps(width),
    )


def silu_mul_quantise(gate_up: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """`kernels.gpu.silu_mul.silu_mul`, whose result is quantised instead of stored.

    gate_up: `[rows, 2 * width]`. codes: e4m3 `[rows, width]`. scales: fp32 `[rows]`.
    """
    rows, width = codes.shape
    check("gate_up", gate_up, (rows, 2 * width), *FLOATS)
    _check_out(codes, scales, rows, width)
    _silu_mul_quantise_kernel[(rows,)](
        gate_up,
        codes.view(torch.uint8),
        scales,
        WIDTH=width,
        WIDTH_PAD=triton.next_power_of_2(width),
        BY_HAND=INTERPRET,
        num_warps=_warps(width),
    )


def _check_out(codes: torch.Tensor, scales: torch.Tensor, rows: int, width: int) -> None:
    check("codes", codes, (rows, width), E4M3)
    check("scales", scales, (rows,), torch.float32)
    if width > MOST_WIDTH:
        raise ValueError(f"width must be at most {MOST_WIDTH}, not {width}")


def _warps(width: int) -> int:
    return int(min(16, max(1, triton.next_power_of_2(width) // 512)))
