"""Results of `neo bench` without a server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from neo_client.bench.drive import TICK_SECONDS, Driver, Pace
from neo_client.bench.own import OwnLoad
from neo_client.bench.prompts import PromptMaker
from neo_client.bench.result import result_of
from neo_client.bench.sample import Sample
from neo_client.prices import Fleet


def result_of_samples(
    samples: Sequence[Sample],
    *,
    targets: Mapping[str, float] | None = None,
    fleet: Fleet | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """As a run would leave it that has seen these."""

    def never(*_: Any) -> Any:
        raise AssertionError("nothing is called")

    driver = Driver(never, PromptMaker(10, [], 0, 0), Pace(is_open=False))
    driver.samples = list(samples)
    driver.started = len(driver.samples)
    driver.ticks = Counter(int(s.last / TICK_SECONDS) for s in samples if s.last is not None)
    return result_of(
        driver, options={"rate": None, **(options or {})}, targets=targets or {},
        server={"model": "m"}, own=OwnLoad(), machine={"cpu": "c"}, fleet=fleet or Fleet(),
        started_at="2026-11-30", interrupted=False,
    )  # fmt: skip
