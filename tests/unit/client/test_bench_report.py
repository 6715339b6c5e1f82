"""The HTML report: whole, self-contained, and safe with any name."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from neo_client.bench.report.page import report
from neo_client.bench.report.svg import Axis, Plot, Series, draw
from neo_client.bench.sample import Sample
from tests.support.bench import result_of_samples

VOID = {"meta", "line", "br", "path"}


class Checker(HTMLParser):
    """Every element is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert "script" not in checker.seen
    assert not re.search(r"(src|href)=|url\(|@import|https?://", page)
    return checker


def run(seed: int = 0, count: int = 50, **more: Any) -> dict[str, Any]:
    draw = random.Random(seed)
    samples = []
    for number in range(count):
        due = 0.2 * number
        made = Sample(number, 0, due, due, 20 + number % 7, 4)
        for at in range(4):
            made.take(1, due + draw.lognormvariate(-2, 1) * (at + 1))
        made.end = made.last or 0.0
        samples.append(made)
    return result_of_samples(samples, **more)


def test_one_run() -> None:
    result = run(targets={"ttft": 300})
    result["server"]["agreement"] = [
        {"what": "requests", "client": 50, "server": 55, "difference_percent": -9.1}
    ]
    checker = checked(report([("a", result)]))
    text = " ".join(checker.text)
    for expected in ("TTFT p50 / p99", "target 300 ms", "goodput", "Inter-token latency",
                     "server counts otherwise: requests 50 here, 55 there"):  # fmt: skip
        assert expected in text
    assert checker.seen >= {"svg", "path", "table", "details"}


def test_several_runs_are_compared_with_the_first() -> None:
    page = report([("old", run(1)), ("new", run(2)), ("newer", run(3))])
    text = " ".join(checked(page).text)
    assert "new against old" in text
    assert "newer against old" in text
    assert "ttft_p50_ms" in text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a"b', "&amp;", "日本"])
def test_names_are_text(name: str) -> None:
    result = run(options={"model": name})
    result["server"]["model"] = name
    result["figures"]["failures"] = {name: 1}
    checker = checked(report([(name, result), (name, result)]))
    assert name in "".join(checker.text)


def test_runs_without_anything_to_show() -> None:
    empty = result_of_samples([])
    assert "No data" in " ".join(checked(report([("empty", empty)])).text)
    checked(report([("empty", empty), ("full", run())]))
    failed = Sample(0, 0, 0.0, 0.0, 5, 5, code="UNAVAILABLE")
    assert "1 failed: UNAVAILABLE" in " ".join(
        checked(report([("f", result_of_samples([failed]))])).text
    )


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, False), (0, 0, False), (0, 1e-6, False), (0, 123456, False), (0.01, 5000, True),
     (3, 3, True), (7, 8, True), (1e-3, 1e7, True)],
)  # fmt: skip
def test_ticks_are_few_and_inside(low: float, high: float, log: bool) -> None:
    axis = Axis(low, high, 10, 110, log)
    assert 1 <= len(axis.ticks) <= 14
    places = [axis.at(tick) for tick in axis.ticks]
    assert places == sorted(places)
    assert min(places) >= 10 - 1e-6
    assert max(places) <= 110 + 1e-6


def test_values_are_where_the_axes_say() -> None:
    plot = Plot("t", "x", "y", [Series([(0, 0), (10, 100)], 0)], y_top=100)
    path = re.search(r'd="M([\d.]+),([\d.]+)L([\d.]+),([\d.]+)"', draw(plot))
    assert path is not None
    x0, y0, x1, y1 = map(float, path.groups())
    assert x0 < x1
    assert y0 > y1  # up is less
    ticks = dict(re.findall(r'class="y" x="[\d.]+" y="([\d.]+)">([\d.k]+)<', draw(plot)))
    at = {label: float(y) - 3.5 for y, label in ticks.items()}
    assert at["0"] == pytest.approx(y0, abs=0.1)
    assert at["100"] == pytest.approx(y1, abs=0.1)
