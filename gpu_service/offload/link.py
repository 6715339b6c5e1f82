"""One Attend stream: what goes out is queued and bounded, what comes in is read by a thread of its
own."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator

import grpc

from neo_common.grpc.channel import peer_credentials, peer_options
from neo_common.grpc.settings import PeerSettings
from protos.neo.v1 import cpu_attention_pb2 as pb
from protos.neo.v1 import cpu_attention_pb2_grpc as pb_grpc

_MAX_QUEUED = 64
MAX_CONTROL = 256
"""Control messages that wait to be taken: a service answers what it is asked, one by one."""
_MAX_MESSAGE_BYTES = 64 << 20
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # Each attempt is a fresh connection: no waiting for the back-off of a shared one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


def _channel(address: str, peer: PeerSettings) -> grpc.Channel:
    options = [*_CHANNEL_OPTIONS, *peer_options(peer)]
    credentials = peer_credentials(peer)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


class LinkBroken(Exception):
    """The stream has ended. `code` is its status, None when this side ended it or a time-out
    passed."""

    def __init__(self, message: str, code: grpc.StatusCode | None = None) -> None:
        super().__init__(message)
        self.code = code


class Link:
    """`control` messages wait to be taken by `receive`; tensors go to `on_tensor` in the reader's
    thread."""

    def __init__(
        self,
        address: str,
        on_tensor: Callable[[pb.AttendResponse], None],
        wake: Callable[[], None],
        peer: PeerSettings | None = None,
    ) -> None:
        """`wake` is called, from the reader's thread, when a control message has come or the stream
        has ended. Certificates are read anew for each link. Raises ValueError when they cannot
        be."""
        self._channel = _channel(address, peer or PeerSettings())
        self._outgoing: queue.Queue[pb.AttendRequest | None] = queue.Queue(_MAX_QUEUED)
        self._control: queue.SimpleQueue[pb.AttendResponse | LinkBroken] = queue.SimpleQueue()
        self._on_tensor = on_tensor
        self._wake = wake
        self._over = threading.Event()
        stub = pb_grpc.CpuAttentionServiceStub(self._channel)
        self._call = stub.Attend(self._requests())
        self._reader = threading.Thread(target=self._read, name="neo-offload-read", daemon=True)
        self._reader.start()

    def _requests(self) -> Iterator[pb.AttendRequest]:
        while (request := self._outgoing.get()) is not None:
            yield request

    def _read(self) -> None:
        try:
            for response in self._call:
                if response.WhichOneof("message") in ("kv_data", "result", "step_error"):
                    self._on_tensor(response)
                elif self._control.qsize() < MAX_CONTROL:
                    self._control.put(response)
                    self._wake()
                else:
                    self._call.cancel()
            broken = LinkBroken("the cpu_service ended the stream")
        except grpc.RpcError as error:
            broken = LinkBroken(str(error.details()), error.code())
        self._over.set()
        self._control.put(broken)
        self._wake()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def send(self, request: pb.AttendRequest, timeout: float) -> None:
        """Queue a message. Raises LinkBroken when the peer does not take messages for `timeout`
        seconds."""
        if self.over:
            raise LinkBroken("the stream has ended")
        try:
            self._outgoing.put(request, timeout=timeout)
        except queue.Full:
            raise LinkBroken("the cpu_service does not take messages") from None

    def receive(self, timeout: float) -> pb.AttendResponse | None:
        """The next control message, None when there is none in time. Raises LinkBroken at the
        stream's end."""
        try:
            message = (
                self._control.get(timeout=timeout) if timeout > 0 else self._control.get_nowait()
            )
        except queue.Empty:
            return None
        if isinstance(message, LinkBroken):
            self._control.put(message)
            # Not itself: with its traceback it would keep the callers' frames for as long as it is
            # here, and the memory of an epoch that is over with them.
            raise LinkBroken(str(message), message.code)
        return message

    def expect(self, kind: str, timeout: float) -> pb.AttendResponse:
        """The next control message, which must be of that kind. Raises LinkBroken."""
        message = self.receive(timeout)
        if message is None:
            raise LinkBroken(f"the cpu_service did not answer within {timeout:g} s")
        if message.WhichOneof("message") != kind:
            raise LinkBroken(f"the cpu_service did not answer with {kind}")
        return message

    def cancel(self) -> None:
        """Ends the stream from any thread; `close` is still to come."""
        self._call.cancel()

    def close(self) -> None:
        """Ends the stream; the session goes on. Idempotent; not from the reader's thread."""
        self._call.cancel()
        # gRPC's own thread waits in `_requests` until it gets the end mark, which needs room.
        with contextlib.suppress(queue.Empty):
            while self._outgoing.full():
                self._outgoing.get_nowait()
        self._outgoing.put(None)
        self._reader.join()
        self._channel.close()


class Waker:
    """Wakes a thread that polls `fd`."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()

    def wake(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        with self._lock:
            os.close(self.fd)
            self.fd = -1
