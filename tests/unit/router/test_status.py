"""What the status page is told: differences of totals, over restarts and without data."""

from __future__ import annotations

import json
from typing import Any

import pytest

from protos.neo.v1 import engine_pb2 as engine
from router.backend import Backend
from router.status.fleet import HISTORY_SECONDS, MODE_WINDOW_SECONDS, Fleet
from router.status.recent import MOST_WAITS, Calls, RecentCalls

NO_CALLS = Calls(0, 0, 0, None, None)


def load(instance: str, tokens: int, inline: float) -> engine.LoadSnapshot:
    snapshot = engine.LoadSnapshot(
        state=engine.ENGINE_STATE_SERVING, instance_id=instance, block_tokens=16,
        gpu=engine.TierLoad(total_blocks=10, free_blocks=4, tokens_total=tokens),
    )  # fmt: skip
    snapshot.mode_seconds_total["inline"] = inline
    return snapshot


def backend(address: str = "a:1") -> Backend:
    return Backend(address, None, 2.0)  # type: ignore[arg-type]


def look(fleet: Fleet, which: Backend, at: float, snapshot: engine.LoadSnapshot) -> dict[str, Any]:
    which.snapshot(snapshot, at)
    data = fleet.look([which], NO_CALLS, at)
    json.dumps(data, allow_nan=False)
    (row,) = data["backends"]
    found: dict[str, Any] = row
    return found


def test_rates_are_of_the_last_second_and_modes_of_the_window() -> None:
    fleet, it = Fleet(), backend()
    assert look(fleet, it, 0.0, load("x", 0, 0.0))["tokens_per_second"] == 0
    for second in range(1, 31):
        row = look(fleet, it, float(second), load("x", 10 * second, 0.5 * second))
    assert row["tokens_per_second"] == 10
    assert row["modes"] == {"inline": pytest.approx(0.5)}
    row = look(fleet, it, 31.0, load("x", 400, 0.5 * 30))
    assert row["tokens_per_second"] == 100
    expected = 0.5 * (MODE_WINDOW_SECONDS - 1) / MODE_WINDOW_SECONDS
    assert row["modes"]["inline"] == pytest.approx(expected)


def test_an_engine_that_starts_again_begins_anew() -> None:
    fleet, it = Fleet(), backend()
    look(fleet, it, 0.0, load("x", 1000, 50.0))
    row = look(fleet, it, 1.0, load("y", 5, 0.1))
    assert row["tokens_per_second"] == 0
    assert row["modes"] == {}


def test_the_same_snapshot_twice_is_no_news() -> None:
    fleet, it = Fleet(), backend()
    look(fleet, it, 0.0, load("x", 0, 0.0))
    before = look(fleet, it, 1.0, load("x", 10, 0.5))
    after = fleet.look([it], NO_CALLS, 1.5)["backends"][0]
    assert after["tokens_per_second"] == before["tokens_per_second"]


def test_a_backend_that_never_spoke_has_a_row_and_history_is_bounded() -> None:
    fleet = Fleet()
    for second in range(HISTORY_SECONDS + 5):
        data = fleet.look([backend()], NO_CALLS, float(second))
    assert len(data["history"]) == HISTORY_SECONDS
    assert data["backends"][0]["state"] == "down"
    assert data["history"][-1]["waiting"] == 0


def test_waits_of_calls_are_ranked_and_bounded() -> None:
    recent = RecentCalls()
    assert recent.look() == NO_CALLS
    for tenth in range(100):
        recent.first_message(tenth / 10)
    calls = recent.look()
    assert (calls.p50_seconds, calls.p95_seconds) == (5.0, 9.5)
    for _ in range(MOST_WAITS + 1):
        recent.first_message(1.0)
    recent.first_message(2.0)
    assert recent.look().p95_seconds == 1.0
    assert recent.look() == NO_CALLS
