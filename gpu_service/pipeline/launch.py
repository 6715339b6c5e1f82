"""What the engine core asks of whoever runs its plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from gpu_service.model.sampling import SamplingRow
from gpu_service.scheduling.plan import IterationPlan, SweepResult


class LaunchedSweep(Protocol):
    """A sweep that has begun."""

    @property
    def is_done(self) -> bool:
        """`result` does not wait."""
        ...

    def result(self) -> SweepResult:
        """What became of it; waits for the device."""
        ...


class Runner(Protocol):
    """The engine's hands. Used by the engine core's thread."""

    def launch(self, plan: IterationPlan, sampling: Mapping[int, SamplingRow]) -> LaunchedSweep:
        """Begin with a plan. `sampling` has an entry for each of its choices.

        Sweeps run in the order of their launch, and at most one before the newest is unfinished.
        When memory runs out the sweep is void, and the request that asked for most of it ends."""
        ...

    def close(self) -> None:
        """No launch comes any more: let go of what belongs to others."""
        ...


class DoneSweep:
    """The sweep of a runner that waits for the device itself."""

    is_done = True

    def __init__(self, result: SweepResult) -> None:
        self._result = result

    def result(self) -> SweepResult:
        return self._result
