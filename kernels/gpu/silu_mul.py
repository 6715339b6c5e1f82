"""SiLU-and-multiply of a fused gate-up projection (SwiGLU, Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.tensors import FLOATS, check


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    ok = at < WIDTH
    gate = tl.load(gate_up_ptr + row * 2 * WIDTH + at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * WIDTH + WIDTH + at, mask=ok, other=0.0)
    product = (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + at, product, mask=ok)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """`out[:, i] = silu(gate_up[:, i]) * gate_up[:, width + i]`.

    gate_up: `[rows, 2 * width]`. out: `[rows, width]`.
    """
    rows, width = out.shape
    check("gate_up", gate_up, (rows, 2 * width), *FLOATS)
    check("out", out, (rows, width), gate_up.dtype)
    chunk = min(2048, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, chunk))
    _silu_mul_kernel[grid](gate_up, out, WIDTH=width, CHUNK=chunk, num_warps=4)
