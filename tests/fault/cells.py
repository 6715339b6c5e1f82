"""The crash matrix as data: who is hit, how, when, in which mode, and what becomes of it.

Of the four modes the router and the front end know nothing: they are hit in one.
"""

from __future__ import annotations

import itertools
import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc

from tests.support.crash import When, Who


class How(StrEnum):
    KILL = "kill"
    OOM = "oom"
    """The kernel kills it for memory."""
    TERM = "term"
    PAUSE = "pause"
    """SIGSTOP, and SIGCONT before anybody's deadline."""
    HANG = "hang"
    """SIGSTOP, and SIGCONT once a deadline has passed: a sweep's for the cpu_service, the lease for
    the core, the router's patience for the front end, a call's for the router."""
    GONE = "gone"
    """Killed, and not started again within the lease."""
    LAPSE = "lapse"
    """SIGSTOP, and SIGCONT after the lease."""


End = tuple[grpc.StatusCode | None, str]
OK: End = (None, "")
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
ENGINE_LOST, BACKEND_LOST = (UNAVAILABLE, "ENGINE_LOST"), (UNAVAILABLE, "BACKEND_LOST")
HOST_TIER_LOST, NO_BACKEND = (UNAVAILABLE, "HOST_TIER_LOST"), (UNAVAILABLE, "NO_BACKEND")
DEADLINE_EXCEEDED: End = (grpc.StatusCode.DEADLINE_EXCEEDED, "")
CUT: End = (UNAVAILABLE, "")
"""A broken connection: nobody is there to give a reason."""

DEADLY = (How.KILL, How.OOM)
BUSY = (When.PREFILL, When.DECODE, When.MIGRATION)
ALL = (When.IDLE, *BUSY, When.DRAIN)
MODES = ("inline", "deferred", "asymmetric", "auto")
ONE_MODE = ("deferred",)


@dataclass(frozen=True)
class Row:
    """Cells that end alike."""

    who: Who
    how: tuple[How, ...]
    when: tuple[When, ...]
    modes: tuple[str, ...]
    host: End = OK
    """Requests on the host tier that were under way."""
    gpu: End = OK
    exit: int | None = None
    refused: End = OK
    """What a new call at the router gets while it is away."""


@dataclass(frozen=True)
class Cell:
    who: Who
    how: How
    when: When
    mode: str
    row: Row

    @property
    def name(self) -> str:
        return "-".join((self.who, self.how, self.when, self.mode))

    @property
    def short_lease(self) -> bool:
        return self.how in (How.GONE, How.LAPSE) or (self.who, self.how) == (Who.CORE, How.HANG)

    @property
    def exit(self) -> int | None:
        """Of the service; None: it lives. A core that ends well while its front end drains is no
        loss."""
        well = (self.who, self.how, self.when) == (Who.CORE, How.TERM, When.DRAIN)
        return 0 if well else self.row.exit

    def needs(self, stream: str) -> bool:
        """A stream of `bring_to` cannot go on without the one that is hit."""
        if self.who is Who.CPU:
            return not stream.startswith("gpu")
        return stream != "beside"

    def ends(self, stream: str) -> tuple[End, ...]:
        """How a stream of `bring_to` may end."""
        if stream == "late":
            return (DEADLINE_EXCEEDED,)
        if stream == "beside":
            end = self.row.host if self.who is Who.CPU else OK
        else:
            end = self.row.gpu if stream.startswith("gpu") else self.row.host
        # Who is on the GPU tier at that moment stays there; and a front end may go on again before
        # the router's pings have gone unanswered for too long.
        spared = self.when is When.MIGRATION and end == HOST_TIER_LOST
        spared = spared or (self.who, self.how) == (Who.FRONT, How.HANG)
        return (end, OK) if spared else (end,)

    @property
    def pinned(self) -> bool:
        """Nothing is predicted to gain by the host tier here: auto has to be told, or choices
        forced there."""
        return self.mode == "auto" and self.when is not When.MIGRATION

    @property
    def config(self) -> dict[str, object]:
        """Of the engines."""
        patience: dict[str, object] = {"lease_seconds": 120.0}
        if self.short_lease:
            patience = {"lease_seconds": 5.0, "sweep_deadline_ms": 500.0}
        every = 1 if self.when is When.MIGRATION else 0
        offload = "always" if self.pinned else "auto"
        mode = {"offload_mode": self.mode, "offload": offload}
        return {**mode, "force_migration_every": every, **patience}


def row(who: Who, how: tuple[How, ...], when: tuple[When, ...], **expected: Any) -> Row:
    modes = MODES if who in (Who.CPU, Who.CORE) else ONE_MODE
    return Row(who, how, when, modes, **expected)


MATRIX = [
    row(Who.CPU, DEADLY, ALL, exit=-signal.SIGKILL),
    row(Who.CPU, (How.TERM,), ALL, exit=0),
    row(Who.CPU, (How.PAUSE, How.HANG), ALL),
    row(Who.CPU, (How.GONE,), ALL, exit=-signal.SIGKILL, host=HOST_TIER_LOST),
    row(Who.CPU, (How.LAPSE,), ALL, host=HOST_TIER_LOST),
    row(Who.CORE, DEADLY, ALL, exit=1, host=ENGINE_LOST, gpu=ENGINE_LOST, refused=NO_BACKEND),
    row(Who.CORE, (How.TERM,), ALL, exit=1, refused=NO_BACKEND),
    row(Who.CORE, (How.PAUSE, How.HANG), ALL),
    row(
        Who.FRONT, DEADLY, ALL,
        exit=-signal.SIGKILL, host=BACKEND_LOST, gpu=BACKEND_LOST, refused=NO_BACKEND,
    ),
    row(Who.FRONT, (How.TERM,), ALL, exit=0, refused=NO_BACKEND),
    row(Who.FRONT, (How.PAUSE,), ALL),
    row(Who.FRONT, (How.HANG,), ALL, host=BACKEND_LOST, gpu=BACKEND_LOST, refused=NO_BACKEND),
    row(Who.ROUTER, DEADLY, ALL, exit=-signal.SIGKILL, host=CUT, gpu=CUT, refused=CUT),
    row(Who.ROUTER, (How.TERM,), ALL, exit=0, refused=CUT),
    row(Who.ROUTER, (How.PAUSE, How.HANG), ALL),
]  # fmt: skip
CELLS = sorted(
    (
        Cell(who=r.who, how=how, when=when, mode=mode, row=r)
        for r in MATRIX
        for how, when, mode in itertools.product(r.how, r.when, r.modes)
    ),
    key=lambda cell: sorted(map(str, cell.config.items())),
)
"""Those with the same configuration one behind the other: they share a system."""
TELLING = {
    "cpu-kill-decode-deferred",
    "cpu-hang-decode-deferred",
    "core-kill-decode-deferred",
    "router-kill-decode-deferred",
    "cpu-gone-decode-inline",
}
"""The others are in the slow tier."""
