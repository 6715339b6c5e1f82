"""The two one-way sockets between a front end and its engine core, in a directory that only this
user may enter.

    front end  PUSH  -- commands.sock -->  PULL  engine core
    front end  PULL  <--  events.sock  --  PUSH  engine core

The front end binds both and so owns the directory; if it is killed, the next one to start on the
machine removes it. Messages are msgpack; high-water marks bound
both queues: a front end that does not read makes the core wait, and the other way round.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from gpu_service.engine.messages import Command, Event
from neo_common.sockets import remove_stale

COMMAND_QUEUE = 4096
"""Commands in flight: more than `max_waiting_requests` submissions and their aborts."""
EVENT_QUEUE = 256
"""Outputs in flight, one per iteration: seconds of them."""
CONFIG_FILE = "config.json"
_PREFIX = "neo-engine-"
_COMMANDS = "commands.sock"

encoder = msgspec.msgpack.Encoder()
command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def make_directory() -> Path:
    """A new one; those whose front ends were killed are removed."""
    remove_stale(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_COMMANDS}"))
    # mkdtemp makes it 0700: the sockets in it are nobody else's to speak into.
    return Path(tempfile.mkdtemp(prefix=_PREFIX))


def commands_address(directory: Path) -> str:
    return f"ipc://{directory / _COMMANDS}"


def events_address(directory: Path) -> str:
    return f"ipc://{directory / 'events.sock'}"
