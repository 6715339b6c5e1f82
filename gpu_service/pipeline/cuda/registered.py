"""A session's shared memory, registered with CUDA so that kernels read and write it themselves."""

from __future__ import annotations

import ctypes
import math
import mmap

import torch

from gpu_service.offload.shm_tier import MappedSession

_PORTABLE_AND_MAPPED = 3
_MOST_BYTES = 1 << 30
"""Registered at a time: pages are pinned at 0.4 s per GiB."""


class RegisteredSession:
    """Keeps the memory mapped and registered until `close`."""

    def __init__(self, session: MappedSession, device: torch.device, piece_bytes: int) -> None:
        """On a CPU nothing is registered. Raises RuntimeError, with CUDA's reason."""
        self.session = session
        self._ranges: list[int] = []
        if device.type != "cuda":
            return
        # One copy cannot be in two parts: none of them ends within a piece.
        whole = math.lcm(piece_bytes, mmap.PAGESIZE)
        step = max(_MOST_BYTES // whole, 1) * whole
        for address, size in (session.control, session.step, session.pool):
            for first in range(0, size, step):
                self._register(address + first, min(step, size - first))

    def pool(self, layers: int, blocks: int, piece_bytes: int) -> torch.Tensor:
        """uint8 `[layers, blocks, piece_bytes]`"""
        address, size = self.session.pool
        array = (ctypes.c_uint8 * size).from_address(address)
        whole = torch.frombuffer(array, dtype=torch.uint8)
        return whole[: layers * blocks * piece_bytes].view(layers, blocks, piece_bytes)

    def close(self) -> None:
        """No kernel may still use it."""
        for address in self._ranges:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._ranges.clear()

    def _register(self, address: int, size: int) -> None:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = runtime.cudaHostRegister(address, size, _PORTABLE_AND_MAPPED)
        if int(code) != 0:
            self.close()
            raise RuntimeError(
                f"CUDA cannot register {size / (1 << 30):.2f} GiB of shared memory: "
                f"{runtime.cudaGetErrorString(code)}"
            )
        self._ranges.append(address)
