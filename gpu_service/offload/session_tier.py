"""What both transports' tiers share: they follow the keeper's view when polled, and give an epoch
up when it stalls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NoReturn

import torch

from gpu_service.offload.host_tier import HostTierStalled, HostTierState, HostWork
from gpu_service.offload.keeper import Attachment, SessionKeeper, Transport, View
from gpu_service.offload.shape import HostShape, HostTierOptions
from kernels.cpu import DType
from protos.neo.v1 import cpu_attention_pb2 as pb

TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}


class SessionTier(ABC):
    """State, epoch and recovery of a HostTier. The engine core's thread alone calls it."""

    def __init__(self, shape: HostShape, options: HostTierOptions, transport: Transport) -> None:
        """Opens the session. Raises ValueError on bad options, HostTierUnavailable with a
        sentence."""
        options.validate()
        self._shape = shape
        self._options = options
        self._dtype = TORCH_DTYPES[shape.activation]
        self._keeper = SessionKeeper(shape, options, transport)
        self._keeper.open()
        self._view = self._keeper.view
        self._state = self._view.state
        self._epoch = 0
        if self._view.attachment is not None:
            self._epoch = self._view.attachment.epoch
            self._take_over(self._view)

    @property
    def state(self) -> HostTierState:
        return self._state

    @property
    def blocks(self) -> int:
        return self._options.blocks

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def stats(self) -> pb.SessionStats:
        """The cpu_service's counters of this epoch, as of the last heartbeat."""
        return self._keeper.stats

    @property
    def work(self) -> HostWork:
        stats, layout = self._keeper.stats, self._shape.layout
        token_bytes = layout.pool_bytes(1) / layout.block_tokens
        return HostWork(stats.kv_bytes_read / token_bytes, stats.busy_seconds, stats.sweeps)

    def poll(self) -> None:
        view = self._keeper.view
        if view is self._view:
            return
        if view.generation != self._view.generation and not self._state.is_lost:
            # Seen for one poll at least, even if a new session is up already.
            self._state = self._keeper.loss
            self._let_go()
            return
        self._view, self._state = view, view.state
        if view.state is HostTierState.UP:
            assert view.attachment is not None
            self._epoch = view.attachment.epoch
            self._take_over(view)

    def close(self) -> None:
        """Idempotent."""
        if self._state is HostTierState.OFF:
            return
        self._keeper.close()
        self._let_go()
        self._state = HostTierState.OFF

    @abstractmethod
    def _take_over(self, view: View) -> None:
        """Use the view's attachment from now on, instead of what was used before."""

    @abstractmethod
    def _let_go(self) -> None:
        """Use nothing any more."""

    def _require_up(self) -> Attachment:
        if self._state is not HostTierState.UP or self._view.attachment is None:
            raise HostTierStalled("the cpu_service is away")
        return self._view.attachment

    def _stall(self, reason: str) -> NoReturn:
        """The current epoch is over for this side."""
        if self._state is HostTierState.UP and self._view.attachment is not None:
            self._state = HostTierState.DEGRADED
            self._keeper.fail(self._view.attachment, reason)
        raise HostTierStalled(reason)

    def _check_tensor(self, tensor: torch.Tensor, name: str) -> None:
        assert tensor.dtype == self._dtype, f"{name} is {tensor.dtype}, the session {self._dtype}"
