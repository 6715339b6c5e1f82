"""Rows under way on the host that are given up; test_cuda_deferred.py has whole sweeps."""

from __future__ import annotations

from typing import Any

from gpu_service.pipeline.cuda.host_side import HostSide
from gpu_service.scheduling.plan import Flight


class Tier:
    """What `lose` knows of a tier."""

    def __init__(self) -> None:
        self.given_up = 0
        self.epoch = 3

    def give_up(self, reason: str) -> None:
        self.given_up += 1


def with_rows(*flights: Flight) -> tuple[HostSide, Tier]:
    """That were published in the tier's epoch."""
    side, tier = HostSide.__new__(HostSide), Tier()
    side._tier = tier  # type: ignore[assignment]
    side._under_way, side._published = dict.fromkeys(flights), tier.epoch
    side._waiting, side._nobody = [], None  # type: ignore[assignment]
    return side, tier


def test_the_epoch_ends_with_a_sweep_that_is_not_launched() -> None:
    """Rows that are waited for in their layer are never under way."""
    side, tier = with_rows()
    sweep: Any = object()
    assert side.lose(sweep) == ()
    assert tier.given_up == 1


def test_an_epoch_that_came_since_goes_on() -> None:
    flight = Flight(7, 1)
    side, tier = with_rows(flight)
    tier.epoch += 1
    assert side.lose() == (flight,)
    assert tier.given_up == 0


def test_the_epoch_ends_with_rows_that_are_given_up() -> None:
    """Else the host takes the next sweep's doorbells for theirs, and writes into their blocks."""
    flight = Flight(7, 1)
    side, tier = with_rows(flight)
    assert side.lose() == (flight,)
    assert tier.given_up == 1
    assert side.lose() == ()
    assert tier.given_up == 1, "nobody was under way"
