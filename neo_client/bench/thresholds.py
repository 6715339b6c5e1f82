"""Conditions that fail a command: `ttft_p99_ms>500`, or against another run `ttft_p99_ms>+10%`."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from neo_client.bench.figures import names

_FORM = re.compile(r"\s*([a-z0-9_.]+)\s*(<=|>=|<|>)\s*([+-]?)([0-9.]+(?:e[+-]?\d+)?)\s*(%?)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


@dataclass(frozen=True)
class Threshold:
    """Fails when the comparison holds."""

    text: str
    name: str
    sign: str
    limit: float
    relative: bool = False
    """`limit` is a change in percent of the first run's figure."""

    def verdict(self, value: float | None, before: float | None = None) -> str | None:
        """A sentence if it fails. A figure that the run does not have fails, too: otherwise a run
        in which nothing worked would pass."""
        if value is None:
            return f"{self.text}: this run has no {self.name}"
        if not self.relative:
            return f"{self.text}: {value:g}" if _COMPARE[self.sign](value, self.limit) else None
        if before is None:
            return f"{self.text}: the first run has no {self.name}"
        if before == 0:
            change = 0.0 if value == 0 else float("inf")
        else:
            change = 100 * (value / before - 1)
        if not _COMPARE[self.sign](change, self.limit):
            return None
        return f"{self.text}: {before:g} to {value:g} ({change:+.1f}%)"


def parse(text: str, *, relative: bool = False) -> Threshold:
    """relative: also changes against another run. ValueError says what is wrong."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"fail-if must be like 'ttft_p99_ms>500', not {text!r}")
    name, sign, plus, number, percent = match.groups()
    if name not in names():
        close = difflib.get_close_matches(name, sorted(names()), 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"fail-if: there is no figure {name!r}{hint}")
    if bool(percent) and not relative:
        raise ValueError(f"fail-if {text!r}: changes in percent are for neo bench compare")
    if bool(plus) != bool(percent):
        raise ValueError(f"fail-if {text!r}: a change is written with a sign and %, such as >+10%")
    try:
        limit = float(plus + number)
    except ValueError:
        raise ValueError(f"fail-if {text!r}: {number!r} is not a number") from None
    return Threshold(text.strip(), name, sign, limit, bool(percent))


def failures(
    thresholds: list[Threshold],
    figures: Mapping[str, float],
    before: Mapping[str, float] | None = None,
) -> list[str]:
    """One sentence for each threshold that fails."""
    found = (
        each.verdict(figures.get(each.name), None if before is None else before.get(each.name))
        for each in thresholds
    )
    return [sentence for sentence in found if sentence is not None]
