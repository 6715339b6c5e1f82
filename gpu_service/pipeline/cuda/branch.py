"""Launches beside the main ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Branch:
    """A stream that forks from the current one and joins it again, also inside a CUDA graph. On a
    CPU there is none, and everything comes in the order of its launch."""

    def __init__(self, device: torch.device, *, first: bool = False) -> None:
        """`first`: its programs are placed before those of other streams that wait for room; a
        kernel behind a large one would else start when that ends."""
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            priority = -1 if first else 0
            self._stream = torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]
        self._forked = False

    @contextmanager
    def forked(self, when: object = True) -> Iterator[None]:
        """What is launched within runs beside what is launched after it, until `join`; if not
        `when`, in its place."""
        if self._stream is None or not when:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._forked = True
        with torch.cuda.stream(self._stream):
            yield

    def follow(self, other: Branch) -> None:
        """What is launched here from now on comes after what is there, if that is forked."""
        if other._forked and self._stream is not None and other._stream is not None:
            self._stream.wait_stream(other._stream)

    def mark(self) -> torch.cuda.Event | None:
        """The place behind what was launched here until now, for `reach`."""
        if self._stream is None or not self._forked:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def reach(self, mark: torch.cuda.Event | None) -> None:
        """What is launched from now on comes after `mark`; the branch goes on and is joined
        later."""
        if mark is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(mark)

    def join(self) -> None:
        """What is launched from now on comes after the branch."""
        if self._forked and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._forked = False
