"""The engine's end of an Attend stream."""

from __future__ import annotations

import contextlib
import weakref

from gpu_service.offload.link import Link, LinkBroken
from tests.support.stack import free_port


class Held:
    """Stands for an epoch's memory."""


def test_a_broken_link_keeps_nobody_alive_who_asked_it() -> None:
    """It says so again and again, each time anew: with its traceback an exception holds what its
    callers had in hand."""
    link = Link(f"127.0.0.1:{free_port()}", lambda _: None, lambda: None)

    def ask() -> weakref.ref[Held]:
        held = Held()
        with contextlib.suppress(LinkBroken):
            assert link.receive(60) is None
        return weakref.ref(held)

    try:
        for _ in range(2):
            assert ask()() is None
    finally:
        link.close()
