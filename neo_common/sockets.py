"""Unix sockets in the file system, which outlive an owner that was killed."""

from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path


def remove_stale(sockets: Iterable[Path]) -> None:
    """Remove the folders of those sockets that no process holds any more.

    The kernel knows who is bound, across containers too. No owner notices: none of ours takes
    datagrams, so the probe gets EPROTOTYPE from one that lives."""
    for path in sockets:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                dead = probe.connect_ex(str(path)) == errno.ECONNREFUSED
            except OSError:  # a path too long for a socket: none of ours
                continue
        if dead:
            shutil.rmtree(path.parent, ignore_errors=True)
