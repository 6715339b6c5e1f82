"""One line of `neo doctor`."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    OK = "ok"
    WARN = "warn"
    """It works, but worse or smaller than it could."""
    FAIL = "fail"
    """Services will not start, or not serve."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do about it."""

    level: Level
    name: str
    message: str
    remedy: str = ""
    """Never empty for WARN and FAIL."""

    def __post_init__(self) -> None:
        assert self.level is Level.OK or self.remedy, f"{self.name} needs a remedy"


def ok(name: str, message: str) -> Finding:
    return Finding(Level.OK, name, message)


def warn(name: str, message: str, remedy: str) -> Finding:
    return Finding(Level.WARN, name, message, remedy)


def fail(name: str, message: str, remedy: str) -> Finding:
    return Finding(Level.FAIL, name, message, remedy)
