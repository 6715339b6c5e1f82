"""Dense layers whose weights are e4m3 with a scale per output channel, 1 byte a weight.

    weight [outputs, inputs] ~ codes * scales[:, None]     once, at load
    x      [rows, inputs]    ~ codes * scales[:, None]     each row when it comes
    x @ weight.T             ~ (x codes @ weight codes.T) * x scales * weight scales

scale = largest |value| / 448 of a channel or row, 448 being e4m3's largest (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_service.model.linear import Linear

E4M3 = torch.float8_e4m3fn
MULTIPLE = 16
"""What `torch._scaled_mm` wants of inputs and outputs."""
_LARGEST = 448.0
_SMALLEST = 2.0**-60
_CHUNK_ELEMENTS = 1 << 24
"""Weights are quantised so many at a time: fp32 copies of more than 64 MiB are never made."""


@dataclass(frozen=True)
class Fp8Rows:
    """Quantised rows; as weights, a row is an output channel."""

    codes: torch.Tensor
    """e4m3 `[rows, width]`"""
    scales: torch.Tensor
    """fp32 `[rows]`; NaN where a row was not finite."""

    @staticmethod
    def empty(rows: int, width: int, device: torch.device) -> Fp8Rows:
        codes = torch.empty(rows, width, dtype=E4M3, device=device)
        return Fp8Rows(codes, torch.empty(rows, dtype=torch.float32, device=device))

    def part(self, start: int, end: int) -> Fp8Rows:
        """A view of some rows."""
        return Fp8Rows(self.codes[start:end], self.scales[start:end])

    def values(self) -> torch.Tensor:
        """fp32 `[rows, width]`"""
        return self.codes.float() * self.scales[:, None]


def quantised_rows(x: torch.Tensor) -> Fp8Rows:
    """The same as the kernels of `kernels.gpu.fp8_quantize`, by torch. x: `[rows, width]`."""
    wide = x.float()
    finite = wide.abs() < float("inf")
    largest = wide.abs().masked_fill(~finite, float("inf")).amax(-1, keepdim=True)
    kept = largest.clamp_min(_SMALLEST)
    codes = (wide.masked_fill(~finite, 0.0) * (_LARGEST / kept)).clamp_(-_LARGEST, _LARGEST)
    scales = (kept * (1.0 / _LARGEST)).masked_fill(largest.isinf(), float("nan"))
    return Fp8Rows(codes.to(E4M3), scales[:, 0])


def quantise_weight(weight: torch.Tensor, out: Fp8Rows) -> None:
    """weight `[outputs, inputs]`, on any device; a part of it at a time visits `out`'s."""
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        end = min(start + rows, weight.shape[0])
        part, target = quantised_rows(weight[start:end].to(out.codes.device)), out.part(start, end)
        target.codes.copy_(part.codes)
        target.scales.copy_(part.scales)


def random_weight(out: Fp8Rows, seed: int, deviation: float) -> None:
    """Normal values of that standard deviation, never held in another form than a small part."""
    generator = torch.Generator(device=out.codes.device).manual_seed(seed)
    # e4m3's rounding is relative, so it hardly matters where the values lie below its largest.
    spread = _LARGEST / 6
    rows = max(1, _CHUNK_ELEMENTS // out.codes.shape[1])
    for start in range(0, out.codes.shape[0], rows):
        target = out.codes[start : start + rows]
        part = torch.randn(target.shape, generator=generator, device=target.device)
        target.copy_(part.mul_(spread).clamp_(-_LARGEST, _LARGEST))
    out.scales.fill_(deviation / spread)


class Fp8Linear:
    """`x @ weight.T + bias` with rows of x quantised, too. Immutable; calls are thread-safe.

    On a CUDA device `torch._scaled_mm` multiplies codes. Elsewhere they are held in the model's
    dtype (which all of them fit in exactly) for an ordinary product, whose sums are then scaled:
    the same numbers but for the rounding of sums, without fp8's memory.
    """

    def __init__(
        self, weight: Fp8Rows, dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> None:
        """dtype: of what is returned; bfloat16 on a CUDA device. bias: `[outputs]` of it."""
        self.outputs, self.inputs = weight.codes.shape
        self._dtype = dtype
        self._bias = bias
        self._scales = weight.scales
        self._codes: torch.Tensor | None = None
        self._plain: Linear | None = None
        self._quantised: Callable[[torch.Tensor], Fp8Rows] = quantised_rows
        if weight.codes.device.type == "cuda":
            assert dtype == torch.bfloat16
            self._codes = weight.codes.t()
            self._quantised = _by_kernel
        else:
            # fp16 has no room for sums of codes.
            exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            self._plain = Linear(weight.codes.to(exact))
            self._exact = exact

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, inputs] -> [rows, outputs], both in the model's dtype."""
        out = torch.empty(x.shape[0], self.outputs, dtype=self._dtype, device=x.device)
        self.into(self._quantised(x), out)
        return out

    def into(self, x: Fp8Rows, out: torch.Tensor) -> None:
        """The same of rows that are quantised already, into `out` [rows, outputs]."""
        if self._codes is not None:
            torch._scaled_mm(
                x.codes,
                self._codes,
                scale_a=x.scales[:, None],
                scale_b=self._scales[None, :],
                out_dtype=self._dtype,
                use_fast_accum=True,
                out=out,
            )
            if self._bias is not None:  # cuBLAS does not take it for all shapes
                out.add_(self._bias)
            return
        assert self._plain is not None
        sums = self._plain(x.codes.to(self._exact)).float()
        product = sums.mul_(x.scales[:, None]).mul_(self._scales)
        out.copy_(product if self._bias is None else product.add_(self._bias))


def _by_kernel(x: torch.Tensor) -> Fp8Rows:
    # Imports Triton, which `--device cpu` does without.
    from kernels.gpu.fp8_quantize import quantise_rows

    rows = Fp8Rows.empty(x.shape[0], x.shape[1], x.device)
    quantise_rows(x, rows.codes, rows.scales)
    return rows
