"""What a fuzzer calls: a parser with valid messages to begin from, and what counts as a finding.

`one(data)` gives any bytes to a parser. The documented refusal is caught there and looked at;
everything else that comes out of it is a finding: an exception, a crash, more than
`SLOW_SECONDS` of CPU for an input of a few kilobytes, memory without bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grpc

from neo_common.errors import ServiceError

SLOW_SECONDS = 1.0
"""CPU, of the whole process, for one input."""
MAX_BYTES = 4096
MAX_STATUS_BYTES = 8192
"""gRPC's default limit of what a status and its details may take: more of it never arrives."""
_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
Shape = Literal["bytes", "wire", "text"]


class Finding(AssertionError):
    """What a parser must not do."""


@dataclass(frozen=True)
class Target:
    """One parser."""

    name: str
    one: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    """Valid inputs, and some that are interesting otherwise."""
    shape: Shape = "bytes"
    """How inputs are changed: see tests.fuzz.mutate."""
    words: tuple[bytes, ...] = ()
    """What inputs of it are made of, beside what the seeds hold."""
    max_bytes: int = MAX_BYTES
    smoke: int = 150
    """Inputs in the default tier."""

    def run(self, data: bytes, slow: float = SLOW_SECONDS) -> None:
        """`one`, with the CPU that it takes. Slow inputs are tried again: a first one may load what
        is loaded once."""
        for last in (False, True):
            before = time.process_time()
            self.one(data)
            seconds = time.process_time() - before
            if seconds <= slow:
                return
            if last:
                raise Finding(f"{len(data)} bytes took {seconds:.1f} s of CPU")


def refused(error: ServiceError) -> None:
    """Looks at a refusal as its client gets it."""
    if error.code not in _REFUSALS:
        raise Finding(f"{error.code}: {error.message}") from error
    status: Any = error.to_status()
    size = sum(len(key) + len(value) for key, value in status.trailing_metadata)
    # On the wire the message's other bytes than printable ASCII take three each, and what is binary
    # a third more.
    size = 4 * size // 3 + 3 * len(status.details.encode())
    if size > MAX_STATUS_BYTES:
        raise Finding(f"a status of {size} bytes, which no client gets to see")


def clear(error: ValueError, *names: str) -> None:
    """A ValueError for people: one sentence of ours, which names one of `names`."""
    text = str(error)
    if type(error) is not ValueError and not type(error).__module__.startswith("neo_"):
        raise Finding(f"{type(error).__name__}, not a sentence of ours: {text}") from error
    if names and not any(name in text for name in names):
        raise Finding(f"an error that does not say where: {text}") from error
