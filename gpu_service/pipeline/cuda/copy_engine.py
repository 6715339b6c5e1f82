"""The copies of a CUDA device that torch has no call for: many pieces at once, and words of device
memory that a stream waits for or sets."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

_CUDA = 13
"""Its runtime's `cudaMemcpyBatchAsync` is the one described below."""
_WHEN_REACHED = 0
"""CU_STREAM_WAIT_VALUE_GEQ, by the difference's sign: numbers may wrap around."""
_IN_STREAM_ORDER = 1
"""cudaMemcpySrcAccessOrderStream"""

Addresses = npt.NDArray[np.uint64]


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes; no hints where memory is."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("destination_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class CopyEngine:
    """A stream of copies, by the CUDA runtime and driver that torch has loaded.

    https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html
    https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEMOP.html
    """

    def __init__(self, device: torch.device) -> None:
        """After `check_cuda`."""
        runtime, driver = ctypes.CDLL(f"libcudart.so.{_CUDA}"), ctypes.CDLL("libcuda.so.1")
        self._copy = runtime.cudaMemcpyBatchAsync
        self._copy.argtypes = [
            *(ctypes.c_void_p,) * 3,
            ctypes.c_size_t,
            *(ctypes.c_void_p,) * 2,
            ctypes.c_size_t,
            ctypes.c_void_p,
        ]
        self._wait, self._set = driver.cuStreamWaitValue32_v2, driver.cuStreamWriteValue32_v2
        for call in (self._wait, self._set):
            call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        self._attributes = _Attributes(source_access_order=_IN_STREAM_ORDER)
        self._first = ctypes.c_size_t(0)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        """What is queued here from now on comes after what is on torch's current stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def copy(self, targets: Addresses, sources: Addresses, size: int) -> None:
        """Queue pieces of `size` bytes, copied in any order; what comes after this comes after all
        of them. The arrays may be freed at once. Host memory is registered, each piece of it with
        one call."""
        assert targets.shape == sources.shape
        sizes = np.full(len(targets), size, np.uint64)
        code = self._copy(
            targets.ctypes.data,
            sources.ctypes.data,
            sizes.ctypes.data,
            len(sizes),
            ctypes.addressof(self._attributes),
            ctypes.addressof(self._first),
            1,
            self._stream.cuda_stream,
        )
        _check("cudaMemcpyBatchAsync", code)

    def wait(self, word: torch.Tensor, number: int) -> None:
        """What comes after this waits until the word, an int32, has reached `number`."""
        stream = self._stream.cuda_stream
        _check(
            "cuStreamWaitValue32",
            self._wait(stream, word.data_ptr(), _uint32(number), _WHEN_REACHED),
        )

    def set(self, word: torch.Tensor, number: int) -> None:
        """Once what was queued before has ended, the word is `number`."""
        self._set_on(self._stream, word, number)

    def set_behind_sweep(self, word: torch.Tensor, number: int) -> None:
        """Once what is on torch's current stream has ended, the word is `number`."""
        self._set_on(torch.cuda.current_stream(self._stream.device), word, number)

    def _set_on(self, stream: torch.cuda.Stream, word: torch.Tensor, number: int) -> None:
        code = self._set(stream.cuda_stream, word.data_ptr(), _uint32(number), 0)
        _check("cuStreamWriteValue32", code)


def check_cuda() -> None:
    """Raises ValueError with another CUDA than this is written for."""
    version = torch.version.cuda or "none"
    if version.partition(".")[0] != str(_CUDA):
        raise ValueError(
            f"streamed_kv_blocks needs a torch for CUDA {_CUDA}; this one is for {version}"
        )


def _uint32(number: int) -> int:
    return number & 0xFFFFFFFF


def _check(call: str, code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA: {call} failed with error {code}")
