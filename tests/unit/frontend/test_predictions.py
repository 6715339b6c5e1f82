"""What the scheduler foretold and decided, as operators see it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gpu_service.engine.counters import foresight
from gpu_service.engine.messages import Foresight
from gpu_service.frontend.operator import EngineServicer
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import SweepResult
from gpu_service.scheduling.rates import HostRates
from gpu_service.scheduling.scheduler import Scheduler
from protos.neo.v1 import engine_pb2 as pb
from tests.support.fake_model import limits, submit

TOLD = Foresight(
    predicted_seconds={"gpu": 4.0, "cpu": 3.0, "link": 0.5, "sweep": 4.5},
    actual_seconds=4.75, error=0.0625, mode="deferred", why="it pays", host_rows=5.5,
    resident_tokens=900, tokens_per_second=3100.0, gpu_only_tokens_per_second=2800.0,
    host_busy_seconds=2.5,
)  # fmt: skip


def snapshot(told: Foresight | None) -> pb.LoadSnapshot:
    counters = SimpleNamespace(
        seconds={}, device_busy_seconds=1.0, host_wait_seconds=0.0, foresight=told
    )
    dispatcher: Any = SimpleNamespace(load=None, counters=counters)
    return EngineServicer(dispatcher, pb.GetInfoResponse(), lambda: None, 1).snapshot()


def test_a_snapshot_says_what_was_decided_and_foretold() -> None:
    found = snapshot(TOLD)
    assert found.decision.mode == "deferred"
    assert found.decision.why == "it pays"
    assert found.decision.host_rows == 5.5
    assert found.decision.resident_tokens == 900
    assert found.decision.tokens_per_second == 3100
    assert found.decision.gpu_only_tokens_per_second == 2800
    assert dict(found.predicted_seconds_total) == TOLD.predicted_seconds
    assert found.predicted_sweeps_took_seconds_total == 4.75
    assert found.prediction_error == 0.0625
    assert found.host_busy_seconds_total == 2.5


def test_a_snapshot_without_a_decision_has_none() -> None:
    assert not snapshot(None).HasField("decision")


def scheduler_of(**changes: object) -> Scheduler:
    costs = SweepCosts({1: 4.0, 16: 4.0}, {16: 5.0}, 0.0)
    scheduler = Scheduler(limits(**changes), costs, HostRates(cpu_token_ms=1.0))
    scheduler.submit(submit("a", 8, 4), 0.0)
    plan = scheduler.schedule(0.0)
    scheduler.launched(plan)
    scheduler.update(plan, SweepResult(device_seconds=0.010), 0.01, 0.02)
    return scheduler


def test_the_scheduler_tells_what_came_of_its_predictions() -> None:
    told = foresight(scheduler_of(auto=True).steering)
    assert told is not None
    assert told.predicted_seconds["sweep"] == pytest.approx(0.005)
    assert told.predicted_seconds["cpu"] == 0
    assert told.actual_seconds == pytest.approx(0.010)
    assert told.error == pytest.approx(0.05 * 0.5)
    assert told.mode == "gpu_only"
    assert told.why == "all fit on the GPU tier"


def test_a_fixed_mode_is_no_decision() -> None:
    told = foresight(scheduler_of().steering)
    assert told is not None
    assert told.mode == told.why == ""
    assert not snapshot(told).HasField("decision")
