"""A TCP relay between a client and a server that can go bad: stop, delay, reset.

Stands for a network where packets cannot be dropped. What it cannot do: a peer that vanishes. While
it is stopped its kernel still acknowledges what fits into the sockets' buffers; see
tests/support/lossy.py for a link that does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Wire:
    """Used by one event loop."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.delay = 0.0
        """Seconds that each piece takes."""
        self.accepted = 0
        self.address = ""

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self.address

    def stall(self) -> None:
        """Nothing is read or passed on any more, in either direction."""
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    def reset(self) -> None:
        """RST to both ends of every connection."""
        for writer in list(self._writers):
            endpoint: socket.socket = writer.get_extra_info("socket")
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        try:
            host, _, port = self._target.rpartition(":")
            there, back = await asyncio.open_connection(host, int(port))
            self._writers |= {writer, back}
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, back))
                    group.create_task(self._pump(there, writer))
            finally:
                self._writers -= {writer, back}
                back.close()
        except (OSError, asyncio.CancelledError, ExceptionGroup):
            pass  # the end of the connection, one way or another
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while True:
            await self._open.wait()
            piece = await source.read(1 << 16)
            await self._open.wait()
            if self.delay:
                await asyncio.sleep(self.delay)
            if not piece:
                with contextlib.suppress(OSError):
                    sink.write_eof()
                return
            sink.write(piece)
            await sink.drain()


@asynccontextmanager
async def wire(target: str) -> AsyncIterator[Wire]:
    made = Wire(target)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
