"""Checks that every host wrapper makes before it launches."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""In the interpreter `tl.dot` of bf16 operands is garbage (triton 3.7), so kernels widen first."""


def check(name: str, tensor: torch.Tensor, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    """ValueError unless `tensor` has that shape (-1: any size), is contiguous and of one of
    `dtypes`."""
    fits = tensor.dim() == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must be {names}, not {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
