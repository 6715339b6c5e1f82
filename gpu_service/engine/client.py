"""The front end's handle on its engine core: starts the process, talks to it, notices its end.
Imports no torch.

    client = EngineClient(config)
    ready = await client.start(on_progress)
    await client.send(Submit(...))
    async for event in client: ...          Output after Output; Failed if the core dies
    await client.stop()
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from gpu_service.config import GpuServiceConfig
from gpu_service.engine import channel
from gpu_service.engine.messages import Command, Event, Failed, Progress, Ready, Shutdown

SPIN_COUNT = "3000"
"""How long threads of torch's OpenMP spin for the next parallel region; some 10 us. Its default of
milliseconds starves the attention threads of `--device cpu`: on 2 cores 8 rows took 56-590 ms an
iteration with it, 36-39 ms with this, and about 50 ms without spinning."""
LAST_WORDS_SECONDS = 0.05
"""How long after the core's end its messages may still arrive."""
_DEAD = "the engine core ended unexpectedly ({how})"


class EngineStartError(RuntimeError):
    """The core could not start; the message is one sentence that says what to do."""


class EngineClient:
    """One engine core. Used from one event loop; not restartable: make a new client."""

    def __init__(self, config: GpuServiceConfig, module: str = "gpu_service.engine") -> None:
        """module: what the core's process runs; benchmarks have one of their own."""
        self._config = config
        self._module = module
        self._context = zmq.asyncio.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._commands.set_hwm(channel.COMMAND_QUEUE)
        self._events = self._context.socket(zmq.PULL)
        self._events.set_hwm(channel.EVENT_QUEUE)
        self._directory: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._death: asyncio.Task[int] | None = None
        self._unheard = asyncio.Event()
        """Nobody is iterating."""
        self._unheard.set()

    @property
    def pid(self) -> int | None:
        """Of the core's process, once started."""
        return None if self._process is None else self._process.pid

    async def start(self, progress: Callable[[Progress], None] | None = None) -> Ready:
        """Start the core and wait until it can take requests; `progress` hears of long steps.

        Raises EngineStartError. After an error everything is cleaned up."""
        assert self._process is None, "an EngineClient starts once"
        self._directory = channel.make_directory()
        try:
            self._commands.bind(channel.commands_address(self._directory))
            self._events.bind(channel.events_address(self._directory))
            config = msgspec.json.encode(self._config)
            (self._directory / channel.CONFIG_FILE).write_bytes(config)
            command = [sys.executable, "-m", self._module]
            command += ["--directory", str(self._directory), "--parent", str(os.getpid())]
            # A session of its own: the terminal's Ctrl-C is for the front end, which drains first.
            self._process = await asyncio.create_subprocess_exec(
                *command, start_new_session=True, env={"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ}
            )
            self._death = asyncio.create_task(self._process.wait())
            async for event in self:
                if isinstance(event, Ready):
                    return event
                if isinstance(event, Failed):
                    raise EngineStartError(event.message)
                if isinstance(event, Progress) and progress is not None:
                    progress(event)
            raise EngineStartError(_DEAD.format(how="it said nothing"))
        except BaseException:
            await self.stop(grace_seconds=0)
            raise

    async def send(self, command: Command) -> None:
        """Waits when the core is far behind (thousands of commands). One that has ended is told
        nothing: its socket would wait for somebody to take its place."""
        assert self._death is not None, "start it first"
        sending = asyncio.ensure_future(self._commands.send(channel.encoder.encode(command)))
        if not sending.done():
            await asyncio.wait({sending, self._death}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            await sending
        else:
            sending.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events in order. Ends after Failed, and when the core has ended on request. One consumer
        at a time."""
        assert self._death is not None, "start it first"
        self._unheard.clear()
        try:
            while True:
                event = await self._next()
                if event is None:
                    return
                yield event
                if isinstance(event, Failed):
                    return
        finally:
            self._unheard.set()

    async def _next(self) -> Event | None:
        """The next event; None at the end."""
        assert self._death is not None
        received = asyncio.ensure_future(self._events.recv())
        try:
            await asyncio.wait({received, self._death}, return_when=asyncio.FIRST_COMPLETED)
            # What the core said before it ended may still be on its way to us.
            await asyncio.wait({received}, timeout=LAST_WORDS_SECONDS)
        finally:
            if not received.done():
                received.cancel()
        if received.done() and not received.cancelled():
            return channel.event_decoder.decode(received.result())
        code = self._death.result()
        if code == 0:
            return None
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Failed(_DEAD.format(how=how))

    async def stop(self, grace_seconds: float = 10.0) -> None:
        """Let the core finish its live requests within the grace, then end it. Idempotent.

        Somebody should go on reading events meanwhile, or requests with much output cannot end."""
        if self._process is not None and self._process.returncode is None:
            if grace_seconds > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(grace_seconds):
                        await self.send(Shutdown())
                        await self._process.wait()
            with suppress(ProcessLookupError):
                if self._process.returncode is None:
                    self._process.kill()
            await self._process.wait()
        if self._death is not None:
            await asyncio.wait({self._death})
            with suppress(TimeoutError):
                # Closing the socket would cut a consumer off from the core's last words.
                async with asyncio.timeout(10 * LAST_WORDS_SECONDS):
                    await self._unheard.wait()
        self._commands.close(linger=0)
        self._events.close(linger=0)
        self._context.term()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
