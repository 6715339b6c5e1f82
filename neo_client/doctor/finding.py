"""One line of `neo doctor`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


class Level(enum.Enum):
    OK = "ok"
    WARN = "warn"
    """It works, but worse or smaller than it could."""
    FAIL = "fail"
    """Services will not start, or not serve."""


class Cause(enum.IntEnum):
    """Why a machine is refused: its name is for programs, its value is the exit code."""

    PYTHON = 10
    PACKAGES = 11
    EXTENSION = 12
    TORCH = 13
    INSTRUCTION_SET = 14
    CORES = 15
    MEMORY = 16
    HUGEPAGES = 17
    LOCKED_MEMORY = 18
    DEV_SHM = 19
    NUMA = 20
    GPU = 21
    OPEN_FILES = 22


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do about it."""

    level: Level
    name: str
    message: str
    cause: Cause
    remedy: str = ""
    """Never empty for WARN and FAIL."""

    def __post_init__(self) -> None:
        assert self.level is Level.OK or self.remedy, f"{self.name} needs a remedy"

    def required(self) -> Finding:
        """As it counts where a mere warning is not accepted."""
        return replace(self, level=Level.FAIL) if self.level is Level.WARN else self


def refusal(findings: list[Finding]) -> Finding | None:
    """The first that fails; its cause is the doctor's exit code."""
    return next((finding for finding in findings if finding.level is Level.FAIL), None)
