"""The host tier over shared memory: step buffers and doorbells for attention, the mapped pool for
everything else."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_service.offload.host_tier import HostRows, HostTierStalled, HostTierState
from gpu_service.offload.keeper import Attachment, View
from gpu_service.offload.link import Link
from gpu_service.offload.session_tier import SessionTier
from gpu_service.offload.shape import HostShape, HostTierOptions
from kernels.cpu import KvLayout, KvPool, ThreadPool
from kernels.cpu.dataplane import NONCE_BYTES, StepChannel, StepMemory, StepShape, WaitStatus
from neo_common.shm.handoff import fetch, has_ended
from neo_common.shm.memory import SharedMemory
from protos.neo.v1 import cpu_attention_pb2 as pb

_HANDOFF_SECONDS = 5.0


@dataclass(frozen=True)
class MappedSession:
    """One epoch's shared memory as this process maps it: (address, bytes) of each part."""

    epoch: int
    control: tuple[int, int]
    step: tuple[int, int]
    pool: tuple[int, int]
    keep: object
    """The mappings live as long as this does."""


class ShmAttachment:
    """Control and step memory of one epoch, and the tether to the process that works on them."""

    def __init__(
        self,
        epoch: int,
        link: Link,
        tether: socket.socket,
        memory: StepMemory,
        channel: StepChannel,
        pool: KvPool,
    ) -> None:
        self.epoch = epoch
        self.memory = memory
        self.link = link
        self.channel = channel
        self.pool = pool
        self._tether = tether
        self._ended = False

    def tether_fd(self) -> int | None:
        return self._tether.fileno()

    def quiet(self) -> bool:
        self._ended = self._ended or has_ended(self._tether)
        return self._ended

    def interrupt(self) -> None:
        self.channel.revoke()
        self.channel.abort()

    def release(self) -> None:
        self._tether.close()


class ShmTransport:
    """Maps what the service hands over, and keeps the pool's descriptor over the service's
    death."""

    code = pb.TRANSPORT_SHM

    def __init__(self, shape: HostShape, options: HostTierOptions) -> None:
        self._options = options
        self._layout = shape.layout
        self._step = shape.step(options.max_rows, options.max_blocks_per_row)
        self._memory: SharedMemory | None = None
        self._pool: KvPool | None = None

    def attach(self, opened: pb.SessionOpened, link: Link, epoch: int) -> tuple[Attachment, bytes]:
        give = [] if self._memory is None else [self._memory.fd]
        tether, fds = fetch(opened.handoff_socket, opened.handoff_token, give, _HANDOFF_SECONDS)
        try:
            if len(fds) != 3 - len(give):
                raise ValueError(f"the cpu_service handed over {len(fds)} descriptors")
            control_bytes, step_bytes = self._step.sizes()
            with contextlib.ExitStack() as mapped:
                control = mapped.enter_context(SharedMemory.adopt(fds.pop(0), control_bytes))
                step = mapped.enter_context(SharedMemory.adopt(fds.pop(0), step_bytes))
                memory = StepMemory(self._step, control.buffer, step.buffer)
            # The mappings now live as long as `memory`; the descriptors are not needed any more.
            memory.check(epoch, opened.nonce)
            if self._memory is None:
                pool_bytes = self._layout.pool_bytes(self._options.blocks)
                self._memory = SharedMemory.adopt(fds.pop(0), pool_bytes)
                # A view of it keeps the mapping while the engine still holds the KvPool.
                view = memoryview(self._memory.buffer)
                self._pool = KvPool(self._layout, self._options.blocks, view)
            assert self._pool is not None
            nonce = os.urandom(NONCE_BYTES)
            memory.write_engine_nonce(nonce)
            channel = StepChannel(memory, self._options.blocks, self._options.spin_us)
            return ShmAttachment(epoch, link, tether, memory, channel, self._pool), nonce
        except BaseException:
            tether.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def forget(self) -> None:
        self._pool = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def on_tensor(self, response: pb.AttendResponse) -> None:
        """Tensors do not travel in this transport; a peer that sends some anyway is not listened
        to."""


class ShmHostTier(SessionTier):
    """HostTier over shared memory. See host_tier.HostTier for the calls."""

    defers = True

    def __init__(
        self, shape: HostShape, options: HostTierOptions, threads: ThreadPool | None = None
    ) -> None:
        """`threads`: for copies into and out of the pool; None copies in the calling thread."""
        self._channel: StepChannel | None = None
        self._pool: KvPool | None = None
        self._threads = threads
        self._timeout_us = int(options.deadline_seconds * 1e6)
        super().__init__(shape, options, ShmTransport(shape, options))

    def _take_over(self, view: View) -> None:
        assert isinstance(view.attachment, ShmAttachment)
        self._channel = view.attachment.channel
        self._pool = view.attachment.pool

    def _let_go(self) -> None:
        self._channel = None
        self._pool = None

    @property
    def mapped_pool(self) -> KvPool | None:
        """The host pool, while it may be read and written: UP, or DEGRADED with the old peer known
        to be quiet."""
        if self._state is HostTierState.UP:
            return self._pool
        # This side may have noticed the break before the keeper did.
        settled = self._state is HostTierState.DEGRADED and self._view.state is self._state
        return self._pool if settled and self._view.quiet else None

    @property
    def step_shape(self) -> StepShape:
        """What fixes the layout of control and step memory."""
        return self._shape.step(self._options.max_rows, self._options.max_blocks_per_row)

    @property
    def layout(self) -> KvLayout:
        """The host pool's."""
        return self._shape.layout

    @property
    def session(self) -> MappedSession | None:
        """What a device may register and use by itself while the tier is UP."""
        attachment = self._view.attachment
        if self._state is not HostTierState.UP or not isinstance(attachment, ShmAttachment):
            return None
        _, control, step = attachment.memory.addresses
        pool = attachment.pool
        keep = (attachment.memory, pool)
        return MappedSession(attachment.epoch, control, step, pool.memory, keep)

    def publish(self, lanes: Sequence[HostRows]) -> int:
        """As `begin_sweep`, of rows that a device submits and waits for. The sweep before may still
        run."""
        return self._begin(lanes, device_rings=True)

    def give_up(self, reason: str) -> None:
        """The device has waited in vain: this epoch is over."""
        with contextlib.suppress(HostTierStalled):
            self._stall(reason)

    def write_kv(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        pool = self.mapped_pool
        if pool is None:
            self._require_up()
            raise AssertionError("UP without a pool")
        pool.write(layer, slots.cpu(), k.cpu(), v.cpu(), threads=self._threads)

    def read_kv(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Also while DEGRADED: what is in the pool stays readable."""
        if self._pool is None:
            self._require_up()
            raise AssertionError("UP without a pool")
        shape = (len(slots), self._shape.kv_heads, self._shape.head_dim)
        k, v = torch.empty(shape, dtype=self._dtype), torch.empty(shape, dtype=self._dtype)
        self._pool.read(layer, slots.cpu(), k, v, threads=self._threads)
        return k, v

    def _up_channel(self) -> StepChannel:
        self._require_up()
        assert self._channel is not None
        return self._channel

    def begin_sweep(self, lanes: Sequence[HostRows]) -> int:
        return self._begin(lanes, device_rings=False)

    def _begin(self, lanes: Sequence[HostRows], device_rings: bool) -> int:
        channel = self._up_channel()
        status = channel.begin_sweep(
            [(rows.lengths, rows.block_tables) for rows in lanes],
            self._timeout_us,
            device_rings,
            lanes[0].ranges if lanes else None,
        )
        self._check(status, channel)
        return channel.sweep

    def submit(
        self, lane: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self._check_tensor(q, "q")
        self._check_tensor(k, "k")
        self._check_tensor(v, "v")
        if q.is_cuda:
            q, k, v = q.cpu(), k.cpu(), v.cpu()
        self._up_channel().submit(lane, layer, q, k, v)

    def wait(self, lane: int, layer: int, out: torch.Tensor, back: int = 0) -> None:
        self._check_tensor(out, "out")
        channel = self._up_channel()
        target = torch.empty_like(out, device="cpu") if out.is_cuda else out
        self._check(channel.wait(lane, layer, target, self._timeout_us, back), channel)
        if target is not out:
            out.copy_(target)

    def cancel_sweep(self) -> None:
        if self._state is HostTierState.UP:
            channel = self._up_channel()
            self._check(channel.cancel_sweep(self._timeout_us), channel)

    def _check(self, status: WaitStatus, channel: StepChannel) -> None:
        if status is WaitStatus.OK:
            return
        if status is WaitStatus.TIMED_OUT:
            self._stall(
                f"the cpu_service did not answer within {self._options.deadline_seconds:g} s "
                f"(it has done {channel.progress} layers in this epoch)"
            )
        if status is WaitStatus.FAILED:
            self._stall(f"the cpu_service's worker stopped: {channel.error.name}")
        self._stall("the cpu_service has gone")
