"""Asks the NVIDIA driver itself, by its C interface: which GPUs there are, and how fast the link
to one is. No torch, no CUDA toolkit; where there is no driver there are no GPUs."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from neo_common.machine.facts import Gpu

LIBRARY = "libcuda.so.1"
COPY_BYTES = 256 << 20
"""One copy: some milliseconds, so that its start does not count."""
COPIES = 5
_NAME_BYTES = 256
_BUS_ID_BYTES = 32
_NO_DEVICE = 100

Library = Any
"""What ctypes.CDLL gives; tests give their own."""


class CudaError(Exception):
    """The driver refused; the sentence says which call and why."""


class Driver:
    """The calls that are needed here, each checked. One thread."""

    def __init__(self, library: Library) -> None:
        self._library = library
        library.cuMemcpyHtoD_v2.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)
        library.cuMemcpyDtoH_v2.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t)
        library.cuMemAlloc_v2.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        library.cuMemAllocHost_v2.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        library.cuMemFree_v2.argtypes = (ctypes.c_uint64,)
        library.cuMemFreeHost.argtypes = (ctypes.c_void_p,)
        library.cuCtxSetCurrent.argtypes = (ctypes.c_void_p,)

    def call(self, name: str, *arguments: Any) -> None:
        """Raises CudaError."""
        code = int(getattr(self._library, name)(*arguments))
        if code:
            raise CudaError(f"{name}: {self._words(code)}")

    def _words(self, code: int) -> str:
        said = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(said))
        return said.value.decode() if said.value else f"error {code}"

    def count(self) -> int:
        """Raises CudaError."""
        code = int(self._library.cuInit(0))
        if code == _NO_DEVICE:
            return 0
        if code:
            raise CudaError(f"cuInit: {self._words(code)}")
        found = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(found))
        return found.value

    def device(self, ordinal: int) -> tuple[ctypes.c_int, Gpu]:
        handle, total = ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(_NAME_BYTES)
        bus = ctypes.create_string_buffer(_BUS_ID_BYTES)
        self.call("cuDeviceGet", ctypes.byref(handle), ordinal)
        self.call("cuDeviceGetName", name, _NAME_BYTES, handle)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(total), handle)
        self.call("cuDeviceGetPCIBusId", bus, _BUS_ID_BYTES, handle)
        return handle, Gpu(name.value.decode(), total.value, bus.value.decode(), None)

    @contextmanager
    def context(self, device: ctypes.c_int) -> Iterator[None]:
        """The device's primary context is current in the block."""
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self.call("cuCtxSetCurrent", context)
            yield
        finally:
            self.call("cuDevicePrimaryCtxRelease_v2", device)

    @contextmanager
    def memory(self, allocate: str, free: str, size: int) -> Iterator[int]:
        place = ctypes.c_uint64()
        self.call(allocate, ctypes.byref(place), size)
        try:
            yield place.value
        finally:
            self.call(free, place.value)


def gpus(library: Library | None = None) -> list[Gpu]:
    """Those that this process may use. Raises CudaError where a driver is there but does not
    work."""
    driver = _driver(library)
    return [] if driver is None else [driver.device(n)[1] for n in range(driver.count())]


def link_rates(
    ordinal: int,
    library: Library | None = None,
    *,
    size: int = COPY_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Bytes per second to the device and back, between pinned memory and it: the best of some
    copies. Raises CudaError."""
    driver = _driver(library)
    if driver is None:
        raise CudaError("there is no driver")
    driver.count()
    device, _ = driver.device(ordinal)

    def best(name: str, first: int, second: int) -> float:
        seconds = []
        for _ in range(COPIES):
            started = clock()
            driver.call(name, first, second, size)
            # A copy from pinned memory may return before it is done.
            driver.call("cuCtxSynchronize")
            seconds.append(clock() - started)
        return size / min(seconds)

    with (
        driver.context(device),
        driver.memory("cuMemAllocHost_v2", "cuMemFreeHost", size) as host,
        driver.memory("cuMemAlloc_v2", "cuMemFree_v2", size) as there,
    ):
        return best("cuMemcpyHtoD_v2", there, host), best("cuMemcpyDtoH_v2", host, there)


def _driver(library: Library | None) -> Driver | None:
    if library is None:
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError:
            return None
    return Driver(library)
