"""Arrivals, lengths and traces: what `neo bench` and `neo plan` are given."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_client.workloads import Lengths, read_workload
from neo_client.workloads.arrivals import poisson, poisson_until, ramp
from neo_client.workloads.traces import read_trace


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in zip([0.0, *times], times, strict=False)]


@given(st.floats(0.1, 1000), st.floats(0.2, 20), st.integers(0, 1000))
def test_arrivals_ascend_and_repeat_with_their_seed(rate: float, shape: float, seed: int) -> None:
    times = poisson(50, rate, seed, shape)
    assert times == sorted(times) == poisson(50, rate, seed, shape)
    assert times[0] > 0
    assert poisson(50, rate, seed + 1, shape) != times


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_that_were_asked_for(shape: float) -> None:
    found = gaps(poisson(20_000, 5.0, 1, shape))
    assert statistics.mean(found) == pytest.approx(0.2, rel=0.05)
    spread = statistics.stdev(found) / statistics.mean(found)
    assert spread == pytest.approx(shape**-0.5, rel=0.1)


def test_until_a_time_is_the_beginning_of_the_same_arrivals() -> None:
    within = poisson_until(10, 20, 3)
    assert within == poisson(len(within), 20, 3)
    assert within[-1] < 10 <= poisson(len(within) + 1, 20, 3)[-1]


@pytest.mark.parametrize(("first", "last"), [(0, 100), (100, 0), (50, 50), (20, 80)])
def test_a_ramp_has_as_many_arrivals_in_each_half_as_its_rates_say(
    first: float, last: float
) -> None:
    times = ramp(first, last, 100, 2)
    assert times == sorted(times)
    middle = (first + last) / 2
    for begin, rate in ((0, (first + middle) / 2), (50, (middle + last) / 2)):
        count = sum(begin <= at < begin + 50 for at in times)
        assert count == pytest.approx(50 * rate, abs=5 * (50 * rate) ** 0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: poisson(1, 0, 0),
        lambda: poisson(1, 1, 0, burstiness=0),
        lambda: ramp(-1, 2, 10, 0),
        lambda: ramp(0, 0, 10, 0),
        lambda: ramp(1, 2, 0, 0),
    ],
)
def test_rates_that_cannot_be(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="must"):
        call()


def test_the_trace_that_comes_with_the_package() -> None:
    rows = read_trace("azure_conv_2023")
    assert len(rows) == 2000
    assert rows[0].at == 0
    assert rows[0].lengths == Lengths(374, 44)
    assert rows[1].at == pytest.approx(4.314579, abs=1e-6)
    assert [row.at for row in rows] == sorted(row.at for row in rows)
    assert statistics.median(row.lengths.prompt for row in rows) == 1032
    quick = read_trace("azure_conv_2023", 10, speed=4)
    assert [row.at for row in quick] == pytest.approx([row.at / 4 for row in rows[:10]])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b\n1,2\n", "columns"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,1,none\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,1,0\n", "at least 1"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "0 requests"),
    ],
)
def test_files_that_are_no_traces(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_trace(str(path))


def test_traces_that_are_not_there_or_too_short(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither"):
        read_trace("no_such_trace")
    with pytest.raises(ValueError, match="2000 requests"):
        read_trace("azure_conv_2023", 2001)
    with pytest.raises(ValueError, match="speed"):
        read_trace("azure_conv_2023", 1, speed=0)


@pytest.mark.parametrize("rows", [[[1]], [[1, 2, 3]], [["a", 1]], [[0, 1]], {"a": 1}, 3])
def test_files_that_are_no_lengths(tmp_path: Path, rows: object) -> None:
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"lengths\.json"):
        read_workload(str(path), 1)
