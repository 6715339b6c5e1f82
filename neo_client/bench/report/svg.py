"""Small plots as SVG text. Colours are CSS variables of the page: it can be light or dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 40
LABEL_WIDTH = 34
FAR = 2.0
COLOURS = 6
"""`--c0` to `--c5` of the page."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    points: Sequence[Point]
    colour: int
    """Of `COLOURS`."""
    style: str = "line"
    """"line", "steps" (level from a point to the next one) or "dots"."""
    label: str = ""


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word."""

    x: float
    label: str


@dataclass(frozen=True)
class Plot:
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    from_zero: bool = True
    """Else the x axis begins where values do; on a logarithmic one it always does."""
    y_top: float | None = None
    """None: the largest value."""
    marks: Sequence[Mark] = field(default_factory=tuple)
    """Those far beyond all values are left out."""


class Axis:
    """Values -> pixels, with round numbers for ticks."""

    def __init__(self, low: float, high: float, first: float, last: float, log: bool) -> None:
        """`first`, `last`: pixels of the ends. A log axis needs `low` above 0."""
        if high <= low:
            high = low * 2 if log else low + 1
        self.log = log
        self._first, self._last = first, last
        if log:
            self.ticks = _log_ticks(low, high)
            self._low, self._high = math.log(low), math.log(high)
        else:
            self.ticks = _ticks(low, high)
            self._low = min(low, self.ticks[0])
            self._high = max(high, self.ticks[-1])

    def at(self, value: float) -> float:
        if self.log:
            value = math.log(max(value, 1e-12))
        share = (value - self._low) / (self._high - self._low)
        return self._first + min(max(share, 0.0), 1.0) * (self._last - self._first)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step)
    count = math.ceil((high - first * step) / step - 1e-9)
    return [(first + i) * step for i in range(count + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every: tuple[int, ...] = (1, 2, 5) if high / low < 3000 else (1,)
    found = [m * 10.0**d for d in decades for m in every]
    return [tick for tick in found if low <= tick <= high] or [low, high]


def short(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def draw(plot: Plot) -> str:
    """An `<svg>` that scales with its column."""
    points = [point for series in plot.series for point in series.points]
    if not points:
        caption = f"<figcaption>{escape(plot.title)}</figcaption>"
        return f'<figure>{caption}<p class="none">No data.</p></figure>'
    xs = [x for x, _ in points if x > 0 or not plot.log_x] or [1.0]
    marks = [mark for mark in plot.marks if 0 < mark.x <= FAR * max(xs)]
    xs += [mark.x for mark in marks]
    low = min(0.0, *xs) if plot.from_zero and not plot.log_x else min(xs)
    top = plot.y_top or max(y for _, y in points) or 1.0
    x_axis = Axis(low, max(xs), LEFT, WIDTH - RIGHT, plot.log_x)
    y_axis = Axis(0.0, top, HEIGHT - BOTTOM, TOP, False)
    parts = [_grid(x_axis, y_axis, plot)]
    parts += [_mark(mark, x_axis) for mark in marks]
    parts += [_STYLES[series.style](series, x_axis, y_axis) for series in plot.series]
    legend = "".join(
        f'<span><i style="background:var(--c{s.colour % COLOURS})"></i>{escape(s.label)}</span>'
        for s in plot.series
        if s.label
    )
    caption = f"<figcaption>{escape(plot.title)}<span class=legend>{legend}</span></figcaption>"
    return (
        f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(plot.title)}">{"".join(parts)}</svg></figure>'
    )


def _grid(x_axis: Axis, y_axis: Axis, plot: Plot) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(_rule("grid", (LEFT, y), (right, y)))
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{short(tick)}</text>')
    last = -math.inf
    for tick in x_axis.ticks:
        x = x_axis.at(tick)
        if x - last < LABEL_WIDTH:
            continue
        last = x
        parts.append(_rule("tick", (x, bottom), (x, bottom + 4)))
        parts.append(f'<text class="x" x="{x:.1f}" y="{bottom + 16}">{short(tick)}</text>')
    parts.append(_rule("axis", (LEFT, bottom), (right, bottom)))
    below = f'x="{(LEFT + right) / 2}" y="{HEIGHT - 6}"'
    beside = f'transform="translate(12 {(TOP + bottom) / 2}) rotate(-90)"'
    for place, label in ((below, plot.x_label), (beside, plot.y_label)):
        parts.append(f'<text class="x" {place}>{escape(label)}</text>')
    return "".join(parts)


def _rule(kind: str, begin: Point, end: Point) -> str:
    (x1, y1), (x2, y2) = begin, end
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _mark(mark: Mark, x_axis: Axis) -> str:
    x = x_axis.at(mark.x)
    side = ("end", -4) if x > WIDTH * 0.75 else ("start", 4)
    line = _rule("mark", (x, TOP), (x, HEIGHT - BOTTOM))
    place = f'text-anchor="{side[0]}" x="{x + side[1]:.1f}" y="{TOP + 9}"'
    return f'{line}<text class="marked" {place}>{escape(mark.label)}</text>'


def _places(series: Series, x_axis: Axis, y_axis: Axis) -> list[str]:
    return [f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in series.points]


def _line(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    return _path("M" + "L".join(_places(series, x_axis, y_axis)), series)


def _steps(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    """Level from each point to the next one's x."""
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in series.points]
    path = f"M{places[0][0]:.1f},{places[0][1]:.1f}" if places else ""
    for x, y in places[1:]:
        path += f"H{x:.1f}V{y:.1f}"
    return _path(path, series)


def _path(path: str, series: Series) -> str:
    return f'<path class="line" style="{_stroke(series)}" d="{path}"/>'


def _dots(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    # A path of dots of no length with round ends: a tenth of the bytes of as many circles.
    path = "".join(f"M{place}h0" for place in _places(series, x_axis, y_axis))
    return f'<path class="dots" style="{_stroke(series)}" d="{path}"/>'


def _stroke(series: Series) -> str:
    return f"stroke:var(--c{series.colour % COLOURS})"


_STYLES: dict[str, Callable[[Series, Axis, Axis], str]] = {
    "line": _line, "steps": _steps, "dots": _dots,
}  # fmt: skip
