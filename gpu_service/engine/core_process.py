"""The engine core's process: started by the front end, ends with it.

    python -m gpu_service.engine --directory DIR --parent PID

DIR holds the configuration and the sockets (see `channel`).
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import msgspec
import zmq

from gpu_service.config import GpuServiceConfig
from gpu_service.engine import channel
from gpu_service.engine.build import build_core
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Command, Event, Failed, Progress, Shutdown
from gpu_service.offload.keeper import HostTierUnavailable
from gpu_service.pipeline.results import is_out_of_memory
from neo_common.logging import setup

_LOG = logging.getLogger(__name__)

STALLED_WAIT_MS = 20
"""How soon to look again while requests are live but none can run: the host tier is away, or a
deadline comes."""
IDLE_WAIT_MS = 500
"""How soon to look again at the host tier's health when no request is live."""
PROGRESS_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1
_NO_MEMORY = (
    "memory ran out while the model was loading; lower gpu_memory_utilization, gpu_kv_blocks or "
    "max_batch_tokens, or take a smaller model"
)


class CoreChannel:
    """The core's end of the sockets, and the signals that ask it to stop."""

    def __init__(self, directory: Path) -> None:
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PULL)
        self._commands.set_hwm(channel.COMMAND_QUEUE)
        self._commands.connect(channel.commands_address(directory))
        self._events = self._context.socket(zmq.PUSH)
        self._events.set_hwm(channel.EVENT_QUEUE)
        # What was said before the end still arrives, unless the front end is gone too.
        self._events.setsockopt(zmq.LINGER, 2000)
        self._events.connect(channel.events_address(directory))
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno())
        self._poller = zmq.Poller()
        self._poller.register(self._commands, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._terminate = False
        signal.signal(signal.SIGTERM, self._on_terminate)
        # Ctrl-C reaches the front end, which drains and then tells us.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminate = True

    def receive(self, wait_ms: int | None) -> list[Command]:
        """All commands that are there; waits up to `wait_ms` (None: for ever) for the first one."""
        ready = dict(self._poller.poll(wait_ms))
        if self._wake_read.fileno() in ready:
            self._wake_read.recv(4096)
        commands: list[Command] = []
        if self._terminate:
            self._terminate = False
            commands.append(Shutdown())
        while True:
            try:
                message = self._commands.recv(zmq.NOBLOCK)
            except zmq.Again:
                return commands
            commands.append(channel.command_decoder.decode(message))

    def send(self, event: Event) -> None:
        """Waits when the front end is far behind: it has our output to deliver first."""
        self._events.send(channel.encoder.encode(event))

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._wake_read.close()
        self._wake_write.close()
        self._commands.close(linger=0)
        self._events.close()
        self._context.term()


class ProgressEvents:
    """Turns the loader's calls into a few events a second."""

    def __init__(self, sender: CoreChannel) -> None:
        self._sender = sender
        self._next = 0.0
        self._stage = ""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now < self._next and stage == self._stage and done_bytes < total_bytes:
            return
        self._next, self._stage = now + PROGRESS_SECONDS, stage
        self._sender.send(Progress(stage, done_bytes, total_bytes))


def serve(core: EngineCore, commands: CoreChannel) -> None:
    """The loop: waits for commands when nothing can run, else looks for them once per iteration."""
    wait_ms: int | None = 0
    was_live = False
    while not core.is_done:
        for command in commands.receive(wait_ms):
            core.handle(command)
        output = core.step()
        if output is not None:
            commands.send(output)
        live = core.scheduler.live_requests > 0
        if was_live and not live:
            core.scheduler.state.check_integrity()
        was_live = live
        wait_ms = _wait_ms(core)


def _wait_ms(core: EngineCore) -> int | None:
    if core.made_progress:
        return 0
    if core.scheduler.live_requests:
        return STALLED_WAIT_MS
    return IDLE_WAIT_MS if core.host.blocks else None


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the front end ends, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise SystemExit(0)  # it has ended already


def main(
    argv: Sequence[str] | None = None, prepare: Callable[[EngineCore], None] = lambda core: None
) -> int:
    """Returns the exit code. prepare: called once, with the core that is to run."""
    parser = argparse.ArgumentParser(
        prog="python -m gpu_service.engine",
        description="The engine core of a gpu_service; its front end starts it.",
    )
    parser.add_argument("--directory", type=Path, required=True, help="sockets and configuration")
    parser.add_argument("--parent", type=int, required=True, help="process id of the front end")
    arguments = parser.parse_args(argv)
    die_with_parent(arguments.parent)
    text = (arguments.directory / channel.CONFIG_FILE).read_bytes()
    config = msgspec.json.decode(text, type=GpuServiceConfig)
    setup("engine", config.log_level, config.log_format)
    commands = CoreChannel(arguments.directory)
    try:
        return _run(config, commands, prepare)
    finally:
        commands.close()


def _run(
    config: GpuServiceConfig, commands: CoreChannel, prepare: Callable[[EngineCore], None]
) -> int:
    try:
        built = build_core(config, ProgressEvents(commands))
    except (ValueError, OSError, MemoryError, HostTierUnavailable) as error:
        # Known ways to fail carry a sentence for the operator.
        commands.send(Failed(str(error) or _NO_MEMORY))
        return 2
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        commands.send(Failed(_NO_MEMORY))
        return 2
    prepare(built.core)
    commands.send(built.ready)
    try:
        serve(built.core, commands)
    except Exception:
        _LOG.exception("the engine core failed")
        commands.send(Failed("the engine core failed; its log has the details"))
        return 1
    finally:
        built.core.close()
    return 0
