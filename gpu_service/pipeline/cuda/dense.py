"""Dense layers of a sweep with what comes right before them, whose result only they want: it goes
to a buffer of the form that they multiply, 16-bit values or fp8 codes."""

from __future__ import annotations

from typing import Protocol

import torch

from gpu_service.model.fp8 import Fp8Linear, Fp8Rows
from gpu_service.model.linear import Linear
from gpu_service.model.model import CausalLM, LayerLinear
from kernels.gpu.fp8_quantize import add_rms_norm_quantise, quantise_rows, silu_mul_quantise
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.silu_mul import silu_mul


class DenseSteps(Protocol):
    """Launches only, into `out` `[rows, outputs]`; the number of rows is `out`'s."""

    def normed(
        self,
        linear: LayerLinear,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Of `rms_norm(residual += x) * weight`, or without a residual of x's own norm."""
        ...

    def gated(self, linear: LayerLinear, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """Of `silu(gate) * up`."""
        ...

    def plain(self, linear: LayerLinear, x: torch.Tensor, out: torch.Tensor) -> None:
        """Of `x` [rows, inputs]."""
        ...


def dense_steps(model: CausalLM, rows: int) -> DenseSteps:
    """For the model's kind of weights, and sweeps of up to `rows` rows."""
    if isinstance(model.layers[0].qkv, Fp8Linear):
        return _Fp8Steps(model, rows)
    return _PlainSteps(model, rows)


class _PlainSteps:
    def __init__(self, model: CausalLM, rows: int) -> None:
        spec, kind, device = model.spec, model.dtype, model.device
        self._eps = spec.norm_eps
        self._normed = torch.empty(rows, spec.hidden_size, dtype=kind, device=device)
        self._gated = torch.empty(rows, spec.intermediate_size, dtype=kind, device=device)

    def normed(
        self,
        linear: LayerLinear,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        normed = self._normed[: out.shape[0]]
        add_rms_norm(x, residual, weight, normed, eps=self._eps)
        self.plain(linear, normed, out)

    def gated(self, linear: LayerLinear, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        gated = self._gated[: out.shape[0]]
        silu_mul(gate_up, gated)
        self.plain(linear, gated, out)

    def plain(self, linear: LayerLinear, x: torch.Tensor, out: torch.Tensor) -> None:
        assert isinstance(linear, Linear)
        linear.into(x, out)


class _Fp8Steps:
    def __init__(self, model: CausalLM, rows: int) -> None:
        spec = model.spec
        self._eps = spec.norm_eps
        widths = (spec.hidden_size, spec.intermediate_size, spec.query_heads * spec.head_dim)
        self._rows = {width: Fp8Rows.empty(rows, width, model.device) for width in widths}
        """By their width. Steps of the same width follow each other, so they may share."""

    def normed(
        self,
        linear: LayerLinear,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        rows = self._of(linear, out)
        add_rms_norm_quantise(x, residual, weight, rows.codes, rows.scales, eps=self._eps)
        self._multiply(linear, rows, out)

    def gated(self, linear: LayerLinear, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        rows = self._of(linear, out)
        silu_mul_quantise(gate_up, rows.codes, rows.scales)
        self._multiply(linear, rows, out)

    def plain(self, linear: LayerLinear, x: torch.Tensor, out: torch.Tensor) -> None:
        rows = self._of(linear, out)
        quantise_rows(x, rows.codes, rows.scales)
        self._multiply(linear, rows, out)

    def _of(self, linear: LayerLinear, out: torch.Tensor) -> Fp8Rows:
        return self._rows[linear.inputs].part(0, out.shape[0])

    def _multiply(self, linear: LayerLinear, rows: Fp8Rows, out: torch.Tensor) -> None:
        assert isinstance(linear, Fp8Linear)
        linear.into(rows, out)
