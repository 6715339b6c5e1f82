"""Dense layers by cuBLASLt, with the algorithm of one's choice.

torch always takes the first that the library's heuristics name, often not the fastest. The library
is the one that torch has loaded; names and numbers below are those of its C interface.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof

import torch

from kernels.gpu.tensors import check

WORKSPACE_BYTES = 32 << 20

_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_FP32 = 68
# Attributes of a product, and their values.
_TRANS_A, _EPILOGUE, _BIAS_POINTER = 3, 7, 8
_TRANSPOSED, _ADD_BIAS = 1, 4
# Attributes of a search.
_MAX_WORKSPACE_BYTES, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)
_SUMMED_IN_FP32 = 2
"""Parts of a product that is split over its inputs are kept and summed in fp32, in order."""
_ALIGNED_BYTES = 16
"""What is promised about every tensor's address; unless told the library expects 256."""


class Algorithm(ctypes.Structure):
    """How to compute a product (cublasLtMatmulHeuristicResult_t)."""

    _fields_ = (
        ("words", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasLt:
    """The library's handle, and a workspace for all products that run one after the other."""

    def __init__(self, device: torch.device) -> None:
        """Raises OSError where torch came without the library."""
        self._library = ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}")
        self.handle = self.create("cublasLtCreate", "cublasLtDestroy")
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        """For measuring. torch keeps a workspace for every stream on which it ever multiplied."""

    def call(self, name: str, *arguments: object) -> None:
        """Raises RuntimeError unless the library returns 0."""
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned {status}")

    def create(self, name: str, destroy: str, *arguments: object) -> c_void_p:
        """A new object of the library, which lives as long as what is returned."""
        made = c_void_p()
        self.call(name, byref(made), *arguments)
        free: Callable[[c_void_p], int] = getattr(self._library, destroy)
        weakref.finalize(made, free, c_void_p(made.value))
        return made


class LtProduct:
    """`out = x @ weight.T + bias` of one shape and dtype, summed in fp32.

    The library counts columns first: out [outputs, rows] = weight [inputs, outputs]^T @ x [inputs,
    rows].
    """

    def __init__(
        self, library: CublasLt, rows: int, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._library = library
        self._rows, self._shape, self._dtype = rows, weight.shape, weight.dtype
        outputs, inputs = weight.shape
        self._product = library.create(
            "cublasLtMatmulDescCreate",
            "cublasLtMatmulDescDestroy",
            _COMPUTE_FP32,
            _TYPES[torch.float32],
        )
        self._set(_TRANS_A, c_int(_TRANSPOSED))
        if bias is not None:
            self._set(_EPILOGUE, c_int(_ADD_BIAS))
            self._set(_BIAS_POINTER, c_void_p(bias.data_ptr()))
        self._weight = self._layout(inputs, outputs)
        self._x = self._layout(inputs, rows)
        self._out = self._layout(outputs, rows)

    def _set(self, attribute: int, value: c_int | c_void_p) -> None:
        place = (byref(value), c_size_t(sizeof(value)))
        self._library.call("cublasLtMatmulDescSetAttribute", self._product, attribute, *place)

    def _layout(self, rows: int, columns: int) -> c_void_p:
        return self._library.create(
            "cublasLtMatrixLayoutCreate",
            "cublasLtMatrixLayoutDestroy",
            _TYPES[self._dtype],
            c_uint64(rows),
            c_uint64(columns),
            c_int64(rows),
        )

    def algorithms(self, most: int = 8) -> list[Algorithm]:
        """What the heuristics name, up to `most` that may split the inputs and as many that do not
        (the first kind crowds out the second, which is often faster)."""
        found = [*self._search(_SUMMED_IN_FP32, most), *self._search(0, most)]
        return list({tuple(algorithm.words): algorithm for algorithm in found}.values())

    def _search(self, reductions: int, most: int) -> list[Algorithm]:
        library = self._library
        search = library.create("cublasLtMatmulPreferenceCreate", "cublasLtMatmulPreferenceDestroy")
        for attribute, value in (
            (_MAX_WORKSPACE_BYTES, c_size_t(WORKSPACE_BYTES)),
            (_REDUCTIONS, c_uint32(reductions)),
            *((attribute, c_uint32(_ALIGNED_BYTES)) for attribute in _ALIGNMENTS),
        ):
            place = (byref(value), c_size_t(sizeof(value)))
            library.call("cublasLtMatmulPreferenceSetAttribute", search, attribute, *place)
        found, count = (Algorithm * most)(), c_int()
        library.call(
            "cublasLtMatmulAlgoGetHeuristic",
            library.handle,
            self._product,
            self._weight,
            self._x,
            self._out,
            self._out,
            search,
            most,
            found,
            byref(count),
        )
        return [algorithm for algorithm in found[: count.value] if algorithm.state == 0]

    def run(
        self,
        algorithm: Algorithm,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Launch on the current stream; a bias if and only if there was one at first. Every tensor
        starts at a multiple of 16 bytes."""
        outputs, inputs = self._shape
        check("x", x, (self._rows, inputs), self._dtype)
        check("weight", weight, (outputs, inputs), self._dtype)
        check("out", out, (self._rows, outputs), self._dtype)
        if bias is not None:
            check("bias", bias, (outputs,), self._dtype)
            self._set(_BIAS_POINTER, c_void_p(bias.data_ptr()))
        if (x.data_ptr() | weight.data_ptr() | out.data_ptr()) % _ALIGNED_BYTES:
            raise ValueError(f"x, weight and out must start at multiples of {_ALIGNED_BYTES} bytes")
        library, one, zero = self._library, c_float(1), c_float(0)
        target = c_void_p(out.data_ptr())
        library.call(
            "cublasLtMatmul",
            library.handle,
            self._product,
            byref(one),
            c_void_p(weight.data_ptr()),
            self._weight,
            c_void_p(x.data_ptr()),
            self._x,
            byref(zero),
            target,
            self._out,
            target,
            self._out,
            byref(algorithm),
            c_void_p(library.workspace.data_ptr()),
            c_size_t(WORKSPACE_BYTES),
            c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
        )
