"""Arrays at the border of the extension: numpy arrays and CPU torch tensors, by duck typing.

numpy has no bfloat16: a numpy array of bf16 bits is `uint16`, and is taken as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import Any


class DType(IntEnum):
    """Element types, with the numbers of `neo.v1.KvDtype`."""

    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT8 = 4


_ACTIVATIONS = {
    "float32": DType.FLOAT32,
    "bfloat16": DType.BFLOAT16,
    "uint16": DType.BFLOAT16,
    "float16": DType.FLOAT16,
}


def dtype_name(array: Any) -> str:
    return _spelt(array.dtype)


@cache
def _spelt(dtype: Any) -> str:
    """numpy takes 3 us to spell a dtype, and a sweep asks 300 times. There are few dtypes."""
    return str(dtype).removeprefix("torch.")


def activation_dtype(name: str, array: Any) -> DType:
    """The element type of q, k, v or o. Raises ValueError for others than fp32, bf16 and fp16."""
    dtype = _ACTIVATIONS.get(dtype_name(array))
    if dtype is None:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, not {dtype_name(array)}")
    return dtype


def address(name: str, array: Any, shape: Sequence[int], dtype: str | None = None) -> int:
    """The address of a C-contiguous CPU array of that shape. Raises ValueError with a sentence."""
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(array.shape)}, not {tuple(shape)}")
    if dtype is not None and dtype_name(array) != dtype:
        raise ValueError(f"{name} must be {dtype}, not {dtype_name(array)}")
    data_ptr = getattr(array, "data_ptr", None)
    if data_ptr is not None:
        if array.device.type != "cpu":
            raise ValueError(f"{name} must be in host memory, not on {array.device}")
        contiguous, place = array.is_contiguous(), int(data_ptr())
    else:
        contiguous, place = array.flags.c_contiguous, int(array.ctypes.data)
    if not contiguous:
        raise ValueError(f"{name} must be contiguous")
    return place
