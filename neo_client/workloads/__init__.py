"""Requests of a benchmark as lengths of prompt and output."""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from neo_common.documents import from_json

MAX_DIGITS = 9
SPREAD = 0.1
"""`INxOUT` draws each length uniformly within that part of the stated one."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of one request."""

    prompt: int
    output: int


def read_workload(name: str, requests: int, seed: int = 0) -> list[Lengths]:
    """`requests` of `INxOUT` (such as 1000x200), or the first ones of a file of lengths: a path, or
    a name in this folder without its ending. ValueError where there are none."""
    fixed = re.fullmatch(r"(\d+)x(\d+)", name)
    if fixed is None:
        return _from_file(name, requests)
    if max(map(len, fixed.groups())) > MAX_DIGITS:
        raise ValueError(f"workload {name[:40]}...: tokens have at most {MAX_DIGITS} digits")
    draw = random.Random(seed)
    prompt, output = (int(group) for group in fixed.groups())
    return [Lengths(_about(draw, prompt), _about(draw, output)) for _ in range(requests)]


def _about(draw: random.Random, length: int) -> int:
    return max(1, round(length * draw.uniform(1 - SPREAD, 1 + SPREAD)))


def _from_file(name: str, requests: int) -> list[Lengths]:
    path = Path(name)
    if not os.path.exists(path):  # which, unlike Path's, says no to a name that is too long
        path = Path(__file__).parent / f"{name}.json"
    if not os.path.isfile(path):
        raise ValueError(f"workload {name!r} is neither INxOUT nor a file of lengths")
    try:
        found = [Lengths(*map(int, row)) for row in from_json(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"workload {path.name}: not a list of [prompt, output]: {error}") from None
    if any(not 1 <= n < 10**MAX_DIGITS for each in found for n in (each.prompt, each.output)):
        raise ValueError(f"workload {path.name}: tokens must be at least 1, of {MAX_DIGITS} digits")
    if len(found) < requests:
        raise ValueError(f"workload {name!r} has {len(found)} requests, not {requests}")
    return found[:requests]
