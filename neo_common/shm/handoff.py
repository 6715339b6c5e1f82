"""Passing file descriptors over a Unix socket, once per token; the connection then stays as a
*tether*.

    engine                                      cpu_service
    connect, token [+ the pool's descriptor] -> token known? then it is used up
    descriptors                              <- control, step [, pool]
    ... the connection stays open ...
    end of file                              <- it touches that memory no more, or is dead

The kernel closes a dead process's sockets after it has taken its memory away, in every thread. So
the end of file on the tether proves, across containers too, that nobody writes through the old
mappings any more.
"""

from __future__ import annotations

import array
import asyncio
import hmac
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from neo_common.sockets import remove_stale

TOKEN_BYTES = 32
_MAGIC = b"NEOFD1"
_MAX_FDS = 4
_MAX_WAITING = 16
_REQUEST_SECONDS = 5.0
_OK = b"\0"
_REFUSED = b"\1"
# sun_path holds 108 bytes with its closing zero.
_MAX_PATH = 107
_PREFIX = "neo-cpu-"
_SOCKET = "handoff"


class HandoffRefused(Exception):
    """The service did not accept the token or the descriptors; the text is its sentence."""


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, which are closed again when there are too many of them."""
    room = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
    data, ancillary, flags, _ = connection.recvmsg(1024, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        _close_all(fds)
        return b"", []
    return data, list(fds)


def fetch(
    path: str, token: bytes, give: Sequence[int] = (), timeout: float = 5.0
) -> tuple[socket.socket, list[int]]:
    """Engine: hand over `give`, take what the service offers for `token`. Blocks at most `timeout`
    seconds.

    Returns the tether and the descriptors, both the caller's to close. Raises HandoffRefused or
    OSError."""
    tether = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        tether.settimeout(timeout)
        tether.connect(path)
        socket.send_fds(tether, [_MAGIC + token], list(give))
        reply, fds = _receive(tether)
        if reply[:1] != _OK:
            _close_all(fds)
            message = reply[1:].decode(errors="replace")
            raise HandoffRefused(message or "the cpu_service closed the handoff connection")
        tether.setblocking(False)
        return tether, fds
    except BaseException:
        tether.close()
        raise


def has_ended(tether: socket.socket) -> bool:
    """True once the other side has let go (or died). `tether` is non-blocking."""
    try:
        return tether.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class Offer:
    """One token's worth of descriptors, waiting to be fetched; later the service's end of the
    tether."""

    def __init__(
        self,
        token: bytes,
        take: Callable[[list[int]], Sequence[int]],
        released: Callable[[], None],
    ) -> None:
        """`take` gets the peer's descriptors (and owns them), returns the service's; ValueError
        refuses. `released` is called when the peer lets go of the tether, or dies."""
        self.token = token
        self.take = take
        self.tether: socket.socket | None = None
        self._released = released

    @property
    def fetched(self) -> bool:
        return self.tether is not None

    def tie(self, connection: socket.socket) -> None:
        """From now on `connection` is the tether."""
        self.tether = connection
        asyncio.get_running_loop().add_reader(connection.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        # The peer has nothing to say on it but that it is gone.
        if self.tether is not None and has_ended(self.tether):
            asyncio.get_running_loop().remove_reader(self.tether.fileno())
            self._released()

    def end(self) -> None:
        """Tells the peer that its memory is not touched any more. Idempotent."""
        if self.tether is not None:
            asyncio.get_running_loop().remove_reader(self.tether.fileno())
            self.tether.close()
            self.tether = None


class HandoffServer:
    """Listens on a socket of its own (mode 0600, in a new folder of mode 0700) within a running
    event loop."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self.path = Path()
        self._offers: dict[bytes, Offer] = {}
        self._waiting: dict[socket.socket, asyncio.TimerHandle] = {}
        self._listener: socket.socket | None = None

    def start(self) -> None:
        """Raises ValueError with a sentence when the folder cannot be used."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_stale(self._runtime_dir.glob(f"{_PREFIX}*/{_SOCKET}"))
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._runtime_dir))
            self.path = folder / _SOCKET
            if len(os.fsencode(self.path)) > _MAX_PATH:
                folder.rmdir()
                raise ValueError(f"runtime_dir is too long for a socket: {self._runtime_dir}")
            listener.bind(str(self.path))
            self.path.chmod(0o600)
            listener.listen(_MAX_WAITING)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise ValueError(
                f"runtime_dir {self._runtime_dir} cannot be used: {error.strerror}"
            ) from error
        except ValueError:
            listener.close()
            raise
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    def offer(
        self,
        take: Callable[[list[int]], Sequence[int]],
        released: Callable[[], None] = lambda: None,
    ) -> Offer:
        """Whoever presents the new offer's token first gets what `take` returns."""
        offer = Offer(os.urandom(TOKEN_BYTES), take, released)
        self._offers[offer.token] = offer
        return offer

    def withdraw(self, offer: Offer) -> None:
        self._offers.pop(offer.token, None)

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in list(self._waiting):
            self._drop(connection)
        if self._listener is not None:
            loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            shutil.rmtree(self.path.parent, ignore_errors=True)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if len(self._waiting) >= _MAX_WAITING:
            connection.close()
            return
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        self._waiting[connection] = loop.call_later(_REQUEST_SECONDS, self._drop, connection)
        loop.add_reader(connection.fileno(), self._answer, connection)

    def _release(self, connection: socket.socket) -> None:
        self._waiting.pop(connection).cancel()
        asyncio.get_running_loop().remove_reader(connection.fileno())

    def _drop(self, connection: socket.socket) -> None:
        self._release(connection)
        connection.close()

    def _answer(self, connection: socket.socket) -> None:
        self._release(connection)
        try:
            request, given = _receive(connection)
        except OSError:
            connection.close()
            return
        offer = self._find(request)
        try:
            if offer is None:
                _close_all(given)
                raise ValueError("the handoff token is not known, or was used before")
            fds = offer.take(given)
            socket.send_fds(connection, [_OK], list(fds))
        except ValueError as error:
            self._refuse(connection, str(error))
        except OSError:
            connection.close()
        else:
            offer.tie(connection)

    def _find(self, request: bytes) -> Offer | None:
        token = request[len(_MAGIC) :]
        if not request.startswith(_MAGIC):
            return None
        known = next((key for key in self._offers if hmac.compare_digest(key, token)), None)
        return None if known is None else self._offers.pop(known)

    @staticmethod
    def _refuse(connection: socket.socket, message: str) -> None:
        try:
            connection.send(_REFUSED + message.encode()[:1000])
        except OSError:
            pass
        finally:
            connection.close()
