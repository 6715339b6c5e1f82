"""Keeps a session with a cpu_service: opens it, renews its lease, resumes it after a break, gives
it up with the lease.

    (start) --opened--> UP --broken--> DEGRADED --resumed--> UP
                                          |
                                   lease over / KV gone
                                          v
                             EXPIRED / LOST --opened anew--> UP (empty pool, next generation)

All of it happens in one thread. What the engine core sees is a `View`, replaced as a whole, which
it takes over when it polls; so nothing changes under it in the middle of an iteration.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from dataclasses import dataclass
from typing import Protocol

import grpc

from gpu_service.offload.host_tier import HostTierState
from gpu_service.offload.link import MAX_CONTROL, Link, LinkBroken, Waker
from gpu_service.offload.shape import HostShape, HostTierOptions
from kernels.cpu import LAYOUT_VERSION
from neo_common.shm.handoff import HandoffRefused
from neo_common.shm.memory import boot_id
from protos.neo.v1 import cpu_attention_pb2 as pb

_log = logging.getLogger(__name__)

_BACKOFF_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.3)
_RESUME_SECONDS = 5.0
_MAX_BEAT_SECONDS = 1.0
_BEATS_MISSED = 5
_CLOSE_SECONDS = 5.0
_MOST_SECONDS = 1e10
# Nothing that waiting would change.
_PERMANENT = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.PERMISSION_DENIED,
}


class HostTierUnavailable(Exception):
    """The first session could not be opened; one sentence says why."""


class Attachment(Protocol):
    """One epoch's connection, as the transport made it."""

    epoch: int
    link: Link

    def tether_fd(self) -> int | None:
        """Becomes readable when the peer has let go of shared memory; None: nothing is shared."""
        ...

    def quiet(self) -> bool:
        """True when the peer is known to touch nothing of this epoch any more."""
        ...

    def interrupt(self) -> None:
        """The connection is over: end every wait now and tell the peer to stop. Any thread,
        idempotent."""
        ...

    def release(self) -> None:
        """Let go of the tether. Idempotent."""
        ...


class Transport(Protocol):
    """Makes attachments; called from the keeper's thread, except `on_tensor` (the link's
    reader)."""

    code: pb.Transport

    def attach(self, opened: pb.SessionOpened, link: Link, epoch: int) -> tuple[Attachment, bytes]:
        """Map what the service opened; the bytes are the nonce for MemoryMapped.

        Raises OSError, ValueError or HandoffRefused."""
        ...

    def forget(self) -> None:
        """The session is over: keep nothing of its KV."""
        ...

    def on_tensor(self, response: pb.AttendResponse) -> None: ...


@dataclass(frozen=True)
class View:
    """The session at one moment."""

    state: HostTierState
    attachment: Attachment | None
    """Set when UP; in DEGRADED the last one."""
    generation: int
    """Goes up whenever KV written before is gone."""
    quiet: bool
    """DEGRADED: nobody touches shared memory any more, so that the engine may write to the pool."""


class SessionKeeper:
    def __init__(self, shape: HostShape, options: HostTierOptions, transport: Transport) -> None:
        self.view = View(HostTierState.DEGRADED, None, 1, True)
        self.loss = HostTierState.LOST
        """How the generation before this one ended: LOST or EXPIRED."""
        self._shape = shape
        self._options = options
        self._transport = transport
        self._session_id = os.urandom(16).hex()
        self._epoch = 0
        self._has_kv = False
        self._last_heard = time.monotonic()
        self._waker = Waker()
        self._link: Link | None = None
        self._link_lock = threading.Lock()
        self._closing = threading.Event()
        self._failed: str | None = None
        self._opened = threading.Event()
        self._refusal = ""
        self._stats = pb.SessionStats()
        self._unquiet: list[Attachment] = []
        self._thread = threading.Thread(target=self._run, name="neo-offload", daemon=True)

    @property
    def stats(self) -> pb.SessionStats:
        """The service's counters, as of the last heartbeat."""
        return self._stats

    def open(self) -> None:
        """Start, and wait for the first session. Raises HostTierUnavailable with a sentence."""
        self._thread.start()
        opened = self._opened.wait(self._options.open_seconds)
        if not opened or self._refusal:
            reason = self._refusal or self._failed or "it did not answer"
            self.close()
            raise HostTierUnavailable(
                f"the cpu_service at {self._options.address} cannot be used: {reason}"
            )

    def fail(self, attachment: Attachment, reason: str) -> None:
        """The engine gives this epoch up (a wait ran out, the worker reported an error)."""
        attachment.interrupt()
        if self.view.attachment is attachment:
            self._failed = reason
            self._waker.wake()

    def close(self) -> None:
        """End the session on both sides, or only here when the service does not answer in time."""
        self._closing.set()
        self._waker.wake()
        with self._link_lock:
            if self._link is not None and self.view.state is not HostTierState.UP:
                self._link.cancel()
        self._thread.join()
        self._waker.close()

    # The keeper's thread.

    def _run(self) -> None:
        attempts = 0
        while not self._closing.is_set():
            try:
                attachment = self._connect()
            except (LinkBroken, HandoffRefused, OSError, ValueError) as error:
                attempts += 1
                if self._note(error, attempts):
                    return
            else:
                attempts = 0
                self._hold(attachment)
            self._check_lease()
            if not self._closing.is_set():
                self._closing.wait(_BACKOFF_SECONDS[min(attempts, len(_BACKOFF_SECONDS) - 1)])
        self._release_old()
        self._transport.forget()

    def _release_old(self) -> None:
        while self._unquiet:
            self._unquiet.pop().release()

    def _note(self, error: Exception, attempts: int) -> bool:
        """Remember why an attempt failed. True when the first opening was refused for good."""
        permanent = isinstance(error, LinkBroken) and error.code in _PERMANENT
        if not self._opened.is_set() and (permanent or isinstance(error, ValueError)):
            self._refusal = str(error)
            self._opened.set()
            return True
        if attempts == 1 and not self._closing.is_set():
            # Before the first session nothing is lost yet: the two services start in any order.
            address, seconds = self._options.address, self._options.open_seconds
            if self._opened.is_set():
                _log.warning("host tier: cannot reach the cpu_service yet: %s", error)
            else:
                _log.info(
                    "host tier: waiting up to %g s for the cpu_service at %s: %s",
                    *(seconds, address, error),
                )
        self._failed = str(error)
        return False

    def _request(self) -> pb.OpenSession:
        shape, options = self._shape, self._options
        return pb.OpenSession(
            session_id=self._session_id,
            epoch=self._epoch,
            shape=pb.AttentionShape(
                layers=shape.layers,
                query_heads=shape.query_heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                block_tokens=shape.block_tokens,
                kv_dtype=pb.KvDtype.Name(shape.kv_dtype),
                activation_dtype=pb.KvDtype.Name(shape.activation),
                scale=shape.scale,
                sliding_window=shape.sliding_window,
                softcap=shape.softcap,
            ),
            host_blocks=options.blocks,
            max_rows=options.max_rows,
            max_blocks_per_row=options.max_blocks_per_row,
            transport=self._transport.code,
            lease_seconds=options.lease_seconds,
            resume=self._has_kv,
            layout_version=LAYOUT_VERSION,
            boot_id=boot_id(),
        )

    def _connect(self) -> Attachment:
        """Open or resume; returns once the data plane is on and the old epoch's peer is known to be
        quiet."""
        self._epoch += 1
        session_id = self._session_id
        timeout = _RESUME_SECONDS if self._has_kv else self._options.open_seconds
        attachment: Attachment | None = None
        options = self._options
        link = Link(options.address, self._transport.on_tensor, self._waker.wake, options.peer)
        with self._link_lock:
            self._link = link
        try:
            if self._closing.is_set():
                raise LinkBroken("closing")
            link.send(pb.AttendRequest(open=self._request()), timeout)
            opened = link.expect("opened", timeout).opened
            if self._has_kv and not opened.resumed:
                self._lose("the cpu_service was restarted and does not have it any more")
                self._session_id = session_id  # the new, empty session goes by the same name
            attachment, nonce = self._transport.attach(opened, link, self._epoch)
            link.send(pb.AttendRequest(mapped=pb.MemoryMapped(nonce=nonce)), timeout)
            link.expect("ready", timeout)
            self._await_quiet(timeout)
        except BaseException:
            if attachment is not None:
                attachment.release()
            self._drop_link(link)
            raise
        self._last_heard = time.monotonic()
        return attachment

    def _await_quiet(self, timeout: float) -> None:
        """Blocks in flight with an old peer stay quarantined until it has acknowledged its end, or
        is dead."""
        deadline = time.monotonic() + timeout
        while self._unquiet:
            last = self._unquiet[-1]
            if last.quiet():
                self._unquiet.pop().release()
                continue
            fd = last.tether_fd()
            remaining = deadline - time.monotonic()
            if fd is None or remaining <= 0 or self._closing.is_set():
                raise LinkBroken("the old worker has not stopped yet")
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            poller.register(self._waker.fd, select.POLLIN)
            poller.poll(remaining * 1000)
            self._waker.clear()

    def _drop_link(self, link: Link) -> None:
        with self._link_lock:
            self._link = None
        link.close()

    def _hold(self, attachment: Attachment) -> None:
        """UP until the connection breaks, the engine gives it up, or the session is closed."""
        resumed = self._has_kv
        self._has_kv = True
        self._failed = None
        self.view = View(HostTierState.UP, attachment, self.view.generation, False)
        if resumed:
            _log.info("host tier: resumed, epoch %d", attachment.epoch)
        self._opened.set()
        reason = self._serve(attachment)
        attachment.interrupt()
        if self._closing.is_set():
            self._say_goodbye(attachment.link)
            attachment.release()
        else:
            _log.warning("host tier: %s; waiting for the cpu_service", reason)
            self._unquiet.append(attachment)
            self.view = View(
                HostTierState.DEGRADED, attachment, self.view.generation, attachment.quiet()
            )
        self._drop_link(attachment.link)

    def _serve(self, attachment: Attachment) -> str:
        """Beat until something ends; returns what."""
        beat_seconds = min(self._options.lease_seconds / 10, _MAX_BEAT_SECONDS)
        silence_seconds = min(_BEATS_MISSED * beat_seconds, self._options.lease_seconds / 2)
        poller = select.poll()
        poller.register(self._waker.fd, select.POLLIN)
        tether = attachment.tether_fd()
        if tether is not None:
            poller.register(tether, select.POLLIN)
        sequence, next_beat = 0, time.monotonic() + beat_seconds
        while True:
            poller.poll(max(next_beat - time.monotonic(), 0.0) * 1000 + 1)
            self._waker.clear()
            if self._closing.is_set():
                return "closing"
            if self._failed is not None:
                return self._failed
            if tether is not None and attachment.quiet():
                return "the cpu_service has gone"
            now = time.monotonic()
            try:
                # Not all there is: a service that goes on and on must not keep us from the rest.
                for _ in range(MAX_CONTROL):
                    if (message := attachment.link.receive(0)) is None:
                        break
                    self._last_heard = now
                    if message.WhichOneof("message") == "stats" and _possible(message.stats):
                        self._stats = message.stats
                if now >= next_beat:
                    sequence, next_beat = sequence + 1, now + beat_seconds
                    beat = pb.Heartbeat(sequence=sequence)
                    attachment.link.send(pb.AttendRequest(heartbeat=beat), silence_seconds)
            except LinkBroken as broken:
                return str(broken)
            if now - self._last_heard > silence_seconds:
                return f"the cpu_service has been silent for {silence_seconds:g} s"

    def _say_goodbye(self, link: Link) -> None:
        deadline = time.monotonic() + _CLOSE_SECONDS
        try:
            link.send(pb.AttendRequest(close=pb.CloseSession()), _CLOSE_SECONDS)
            while (left := deadline - time.monotonic()) > 0:
                message = link.receive(left)
                if message is not None and message.WhichOneof("message") == "closed":
                    return
        except LinkBroken:
            pass  # then its lease ends it

    def _check_lease(self) -> None:
        """The lease is over, or (DEGRADED) more may be known of the old peer."""
        if self._closing.is_set() or not self._has_kv:
            return
        view = self.view
        if time.monotonic() - self._last_heard > self._options.lease_seconds:
            self._lose("its lease is over", HostTierState.EXPIRED)
        elif view.attachment is not None and not view.quiet and view.attachment.quiet():
            self.view = View(view.state, view.attachment, view.generation, True)

    def _lose(self, reason: str, loss: HostTierState = HostTierState.LOST) -> None:
        _log.error("host tier: the KV is lost: %s", reason)
        self._transport.forget()
        self._has_kv = False
        self._release_old()
        self._session_id = os.urandom(16).hex()
        self.loss = loss
        self.view = View(loss, None, self.view.generation + 1, False)


def _possible(stats: pb.SessionStats) -> bool:
    """A NaN would stay in all that is predicted from it."""
    return 0 <= stats.busy_seconds < _MOST_SECONDS
