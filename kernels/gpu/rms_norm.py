"""Residual add and RMSNorm in one pass (Zhang, Sennrich 2019, arXiv 1910.07467).

Bytes per row: read x and residual, write residual and out. The floor is those over the bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.tensors import FLOATS, check


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    at = tl.arange(0, WIDTH_PAD)
    ok = at < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + at
    x = tl.load(x_ptr + place, mask=ok, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total = x + tl.load(residual_ptr + place, mask=ok, other=0.0).to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + place, rounded, mask=ok)
        # As transformers does: the norm sees the sum as it is kept, in the model's dtype.
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=ok)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float,
) -> None:
    """`residual += x; out = rms_norm(residual) * weight`; without a residual, of `x` itself.

    x, residual, out: `[rows, width]`, width at most 32768. weight: `[width]`. `out` may be `x`.
    """
    rows, width = x.shape
    check("x", x, (-1, -1), *FLOATS)
    check("weight", weight, (width,), x.dtype)
    check("out", out, x.shape, x.dtype)
    if residual is not None:
        check("residual", residual, x.shape, x.dtype)
    if width > 32768:
        raise ValueError(f"width must be at most 32768, not {width}")
    padded = triton.next_power_of_2(width)
    _add_rms_norm_kernel[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        eps,
        WIDTH=width,
        WIDTH_PAD=padded,
        HAS_RESIDUAL=residual is not None,
        num_warps=min(16, max(1, padded // 512)),
    )
