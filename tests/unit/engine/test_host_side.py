"""Rows under way on the host that are given up; test_cuda_deferred.py has whole sweeps."""

from __future__ import annotations

from gpu_service.pipeline.cuda.host_side import HostSide
from gpu_service.scheduling.plan import Flight


class Tier:
    """What `lose` knows of a tier."""

    def __init__(self) -> None:
        self.given_up = 0

    def give_up(self, reason: str) -> None:
        self.given_up += 1


def test_the_epoch_ends_with_rows_that_are_given_up() -> None:
    """Else the host takes the next sweep's doorbells for theirs, and writes into their blocks."""
    side, tier, flight = HostSide.__new__(HostSide), Tier(), Flight(7, 1)
    side._tier = tier  # type: ignore[assignment]
    side._under_way, side._waiting, side._nobody = {flight: None}, [], None  # type: ignore[assignment]
    assert side.lose() == (flight,)
    assert tier.given_up == 1
    assert side.lose() == ()
    assert tier.given_up == 1, "nobody was under way"
