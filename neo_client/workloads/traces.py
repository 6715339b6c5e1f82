"""Recorded arrivals: CSV files in the form of Azure's LLM inference traces."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from neo_client.workloads import MAX_DIGITS, Lengths

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Traced:
    """A request of a trace."""

    at: float
    """Seconds after the first one."""
    lengths: Lengths


def read_trace(name: str, requests: int | None = None, speed: float = 1.0) -> list[Traced]:
    """The first `requests` of a file, a path or a name in this folder without its ending; they come
    `speed` times as fast. ValueError says what is wrong with it."""
    if speed <= 0:
        raise ValueError("speed must be positive")
    path = Path(name)
    if not os.path.exists(path):  # which, unlike Path's, says no to a name that is too long
        path = Path(__file__).parent / f"{name}.csv"
    if not os.path.isfile(path):
        raise ValueError(f"trace {name!r} is neither a file nor one that comes with this package")
    try:
        found = _rows(path)[:requests]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"trace {path.name} cannot be read: {error}") from None
    if not found or (requests is not None and len(found) < requests):
        raise ValueError(f"trace {path.name} has {len(found)} requests, not {requests or 'any'}")
    first = found[0][0]
    return [Traced((at - first) / speed, lengths) for at, lengths in found]


def _rows(path: Path) -> list[tuple[float, Lengths]]:
    """In the order of time."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not set(COLUMNS) <= set(rows.fieldnames or ()):
            raise ValueError(f"trace {path.name} must have the columns {', '.join(COLUMNS)}")
        return sorted(
            (_row(row, f"{path.name}, line {rows.line_num}") for row in rows),
            key=lambda each: each[0],
        )


def _row(row: Mapping[str, str], where: str) -> tuple[float, Lengths]:
    try:
        # The traces give seven digits of a second; six are what a datetime holds.
        stamp = re.sub(r"(\.\d{6})\d+", r"\1", row["TIMESTAMP"])
        at = datetime.fromisoformat(stamp)
        lengths = Lengths(int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        seconds = at.replace(tzinfo=at.tzinfo or UTC).timestamp()
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"trace {where}: {error}") from None
    if not all(1 <= n < 10**MAX_DIGITS for n in (lengths.prompt, lengths.output)):
        raise ValueError(f"trace {where}: tokens must be at least 1, of {MAX_DIGITS} digits")
    return seconds, lengths
