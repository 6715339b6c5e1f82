"""The host tier of an engine that has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from gpu_service.offload.host_tier import HostRows, HostTierState, HostWork


class NullHostTier:
    """OFF, with no blocks. A scheduler that sees it plans nothing for it; a call that stores or
    computes is a bug."""

    state = HostTierState.OFF
    blocks = 0
    epoch = 0
    mapped_pool = None
    defers = False
    work = HostWork()

    def poll(self) -> None:
        """Nothing changes."""

    def cancel_sweep(self) -> None:
        """There is none."""

    def close(self) -> None:
        """There is nothing to end."""

    def _absent(self) -> NoReturn:
        raise AssertionError("there is no host tier")

    def write_kv(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._absent()

    def read_kv(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._absent()

    def begin_sweep(self, lanes: Sequence[HostRows]) -> int:
        self._absent()

    def submit(
        self, lane: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self._absent()

    def wait(self, lane: int, layer: int, out: torch.Tensor, back: int = 0) -> None:
        self._absent()
