"""Routers and nodes by the hundred: conservation, and what can be worked out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_client import cli
from neo_plan.fleet import Fleet, FleetWishes, fleet_row, routers_for

WISHES = FleetWishes(
    node_rate=10, seconds=2.0, slots=32, output_tokens=100, router_messages=8000,
    interval_ms=200, zones=3,
)  # fmt: skip


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_nothing_is_lost_or_doubled(nodes: int, routers: int, seed: int) -> None:
    fleet = Fleet(replace(WISHES, seed=seed), nodes, routers)
    began = int(fleet._present.sum())
    fleet.run(3.0)
    came = len(fleet.take().waits)
    ended = began + came - int(fleet._present.sum())
    still = sum(end > fleet._now - 1e-9 for end, _ in fleet._leaving)
    assert ended >= 0
    # What has ended within the last step leaves with the next one.
    assert abs(still - int(fleet._present.sum())) <= nodes
    assert came == pytest.approx(nodes * 30, abs=6 * (nodes * 30) ** 0.5)


def test_requests_spread_and_wait_only_where_slots_are_short() -> None:
    calm = fleet_row(WISHES, 30)
    assert calm.waited < 0.01
    assert calm.spread < 1.5
    assert fleet_row(replace(WISHES, slots=21), 30).waited > calm.waited


def test_older_reports_spread_less_evenly() -> None:
    fresh, old = (fleet_row(replace(WISHES, interval_ms=ms), 60) for ms in (50, 5000))
    assert old.spread > fresh.spread


def test_a_zone_that_goes_leaves_its_work_to_the_others() -> None:
    row = fleet_row(WISHES, 30)
    assert row.lost == pytest.approx(10 * 20, rel=0.2)
    assert row.load_after == pytest.approx(20 / 32 * 1.5)
    assert row.waited_after > row.waited
    tight = fleet_row(replace(WISHES, slots=24), 30)
    assert tight.load_after > 1
    assert tight.wait_p99_seconds > row.wait_p99_seconds
    assert fleet_row(WISHES, 2).lost == 0


def test_routers_and_reports() -> None:
    """1,000 messages a second from each node, and as many routers as take them with one lost."""
    assert routers_for(WISHES, 1) == 1
    assert routers_for(WISHES, 2) == 2
    assert routers_for(WISHES, 8) == 3
    assert routers_for(WISHES, 80) == 11
    row = fleet_row(replace(WISHES, seconds=0.5), 80)
    assert row.reports_per_second == 400
    assert row.report_mbit == pytest.approx(11 * 400 * 198 * 8 / 1e6)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "fleet", "--nodes", "1,6", "--node-rate", "5", "--seconds", "1"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "routers" in out
    assert cli.main([*words, "--node-slots", "5"]) == 2
    assert "grow for ever" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", "fleet", "--nodes", "0"])
