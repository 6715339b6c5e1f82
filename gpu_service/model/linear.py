"""Dense layers: a weight in the form that its device multiplies fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

_PACK_ROWS = 512


class Linear:
    """`x @ weight.T + bias`. Immutable; calls are thread-safe.

    On the CPU the weight is laid out once for oneDNN. SmolLM2-135M's 120 linears (2 threads,
    AVX-512 BF16, ms, `functional.linear` -> prepacked): bf16 M=1 18.7 -> 10.5, M=8 26.6 -> 11.6,
    M=32 42.7 -> 27.1; fp32 36 -> 20, 42 -> 22, 76 -> 44. Packing for 1, 16 or 512 rows made no
    difference beyond noise in bf16; 512 was best in fp32. A transposed weight did not help.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` [outputs, inputs]; the caller may drop it afterwards."""
        self.outputs, self.inputs = weight.shape
        self._bias = bias
        self._packed = _can_pack(weight)
        # Plain here, laid out by oneDNN (opaque) where `_packed`.
        self._weight = weight
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, inputs] -> [rows, outputs], both in the weight's dtype."""
        if not self._packed:
            return functional.linear(x, self._weight, self._bias)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return out

    def into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """The same into `out` [rows, outputs]; allocates nothing on a CUDA device."""
        if self._packed:
            out.copy_(self(x))
        elif self._bias is None:
            torch.mm(x, self._weight.t(), out=out)
        else:
            torch.addmm(self._bias, x, self._weight.t(), out=out)


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.float32:
        return True
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False
