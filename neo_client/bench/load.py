"""What a run asks for: sessions of one or more turns, and when each begins.

    session | due ...... turn 1 ======> think ... turn 2 ======>       open loop: `due` is fixed
            | when a worker is free: turn 1 ======> think ...          closed loop: no `due`

Everything follows from the options and the seed; nothing here talks to a server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neo_client.options import Prompt
from neo_client.workloads import Lengths, read_workload
from neo_client.workloads.arrivals import poisson, poisson_until, ramp
from neo_client.workloads.traces import read_trace
from neo_common.documents import from_json

DEFAULT_REQUESTS = 200


@dataclass(frozen=True)
class Session:
    """Requests that build on each other. A single request is a session of one turn."""

    number: int
    due: float | None
    """When its first request should be sent, seconds since the start; None: when a worker is free.
    """
    turns: tuple[Lengths, ...]
    """New prompt tokens of each turn, and output tokens. What came before, the answers included,
    stands in front of a later turn's prompt."""
    prefix: int | None = None
    """Which shared prefix stands in front of it all."""
    prompt: Prompt | None = None
    """Sent as it is; `turns` then says the output alone."""


@dataclass(frozen=True)
class Wishes:
    """The part of the options that says what is asked for."""

    workload: str | None = None
    """`INxOUT`, or a file of lengths; None: the trace's own, or 128x64."""
    trace: str | None = None
    prompts: str | None = None
    """File of prompts, a JSON object a line."""
    requests: int | None = None
    """Sessions; None: as many as `duration`, the trace or the prompts give."""
    duration: float | None = None
    """Seconds in which requests begin."""
    rate: float | None = None
    burstiness: float = 1.0
    ramp: tuple[float, float] | None = None
    speed: float = 1.0
    """Of a trace."""
    turns: int = 1
    prefix_tokens: int = 0
    prefixes: int = 1
    seed: int = 0

    @property
    def is_open(self) -> bool:
        """Arrivals do not wait for answers."""
        return self.trace is not None or self.rate is not None or self.ramp is not None


def make_sessions(wishes: Wishes) -> list[Session] | Iterator[Session]:
    """In the order of arrival. ValueError names what cannot be. A closed loop that ends by time
    alone gets as many as it wants."""
    _check(wishes)
    arrivals, lengths = _arrivals(wishes)
    if arrivals is None and wishes.requests is None and wishes.duration is not None:
        return _endless(wishes)
    count = _count(wishes) if arrivals is None else len(arrivals)
    shapes = _shapes(wishes, count) if lengths is None else [Shape(each) for each in lengths]
    return [
        _session(wishes, number, None if arrivals is None else arrivals[number], shape)
        for number, shape in enumerate(shapes[:count])
    ]


@dataclass(frozen=True)
class Shape:
    """A request before it has a place in time."""

    lengths: Lengths
    prompt: Prompt | None = None


def _check(wishes: Wishes) -> None:
    ways = [
        name for name in ("trace", "rate", "ramp") if getattr(wishes, name) is not None
    ]  # fmt: skip
    if len(ways) > 1:
        raise ValueError(f"{ways[0]} and {ways[1]} exclude each other: both say when requests come")
    if wishes.prompts is not None and (wishes.workload is not None or wishes.prefix_tokens):
        raise ValueError("prompts excludes workload and shared-prefix: it has lengths of its own")
    if wishes.prompts is not None and wishes.turns > 1:
        raise ValueError("prompts excludes turns")
    for name in ("requests", "turns", "prefixes"):
        value = getattr(wishes, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1")
    if wishes.duration is not None and wishes.duration <= 0:
        raise ValueError("duration must be positive")
    if wishes.prefix_tokens < 0:
        raise ValueError("shared-prefix must not be negative")


def _arrivals(wishes: Wishes) -> tuple[list[float] | None, list[Lengths] | None]:
    """Times, and lengths where a trace gives those, too."""
    if wishes.trace is not None:
        rows = read_trace(wishes.trace, wishes.requests, wishes.speed)
        if wishes.duration is not None:
            rows = [row for row in rows if row.at < wishes.duration]
        own = wishes.workload is None and wishes.prompts is None
        return [row.at for row in rows], [row.lengths for row in rows] if own else None
    if wishes.ramp is not None:
        if wishes.duration is None:
            raise ValueError("ramp needs duration: how long it takes")
        times = ramp(*wishes.ramp, wishes.duration, wishes.seed)
    elif wishes.rate is not None:
        rate, seed, burstiness = wishes.rate, wishes.seed, wishes.burstiness
        if wishes.duration is not None:
            times = poisson_until(wishes.duration, rate, seed, burstiness)
        else:
            times = poisson(_count(wishes), rate, seed, burstiness)
    else:
        return None, None
    times = times[: wishes.requests]
    if not times:
        raise ValueError("no request comes within duration")
    return times, None


def _count(wishes: Wishes) -> int:
    if wishes.requests is not None:
        return wishes.requests
    return len(read_prompts(wishes.prompts)) if wishes.prompts is not None else DEFAULT_REQUESTS


def _shapes(wishes: Wishes, count: int) -> list[Shape]:
    if wishes.prompts is not None:
        rows = read_prompts(wishes.prompts)
        return [rows[number % len(rows)] for number in range(count)]
    return [Shape(each) for each in _lengths(wishes, count)]


def _lengths(wishes: Wishes, count: int) -> list[Lengths]:
    return read_workload(wishes.workload or "128x64", count, wishes.seed)


def _endless(wishes: Wishes) -> Iterator[Session]:
    """The same shapes again and again; prompts differ, since sessions' numbers do."""
    shapes, number = _shapes(wishes, _count(wishes)), 0
    while True:
        yield _session(wishes, number, None, shapes[number % len(shapes)])
        number += 1


def _session(wishes: Wishes, number: int, due: float | None, shape: Shape) -> Session:
    prefix = number % wishes.prefixes if wishes.prefix_tokens else None
    return Session(number, due, (shape.lengths,) * wishes.turns, prefix, shape.prompt)


def read_prompts(path: str) -> list[Shape]:
    """Lines such as `{"text": "...", "max_tokens": 64}`; `messages` or `token_ids` instead of
    `text`. ValueError names the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts: cannot read {path}: {error}") from None
    found = [
        _prompt(line, f"prompts, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"prompts: {path} is empty")
    return found


def _prompt(line: str, where: str) -> Shape:
    try:
        row: Mapping[str, Any] = from_json(line)
        given = [row[name] for name in ("text", "messages", "token_ids") if name in row]
        output = int(row["max_tokens"])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"{where}: {error!r}") from None
    kind = str if "text" in row else list
    if len(given) != 1 or not given[0] or not isinstance(given[0], kind) or output < 1:
        raise ValueError(f"{where}: one of text, messages, token_ids; and max_tokens of 1 or more")
    tokens = len(given[0]) if "token_ids" in row else 0
    return Shape(Lengths(tokens, output), given[0])


def longest(session: Session, prefix_tokens: int) -> int:
    """Tokens of its last turn, prompt and output."""
    shared = prefix_tokens if session.prefix is not None else 0
    return shared + sum(turn.prompt + turn.output for turn in session.turns)


def fitted(
    sessions: Sequence[Session], limit: int, prefix_tokens: int, how: str
) -> tuple[list[Session], int]:
    """Sessions that a context of `limit` tokens can hold, and how many were changed for it. how:
    `fail` raises ValueError, `skip` leaves them out, `clip` shortens prompts (and outputs, where
    that is not enough)."""
    shorten: Callable[[Session], Session] = lambda each: clipped(each, limit, prefix_tokens)  # noqa: E731
    long = [s for s in sessions if longest(s, prefix_tokens) > limit]
    if not long:
        return list(sessions), 0
    if how == "fail":
        raise ValueError(
            f"{len(long)} of {len(sessions)} requests are longer than the {limit} tokens that the "
            f"server takes (the longest: {max(longest(s, prefix_tokens) for s in long)}); "
            "--too-long clip or skip says what to do with them"
        )
    if how == "skip":
        numbers = {session.number for session in long}
        left = [session for session in sessions if session.number not in numbers]
        if not left:
            raise ValueError("every request is longer than the server takes")
        return left, len(long)
    return [shorten(s) if longest(s, prefix_tokens) > limit else s for s in sessions], len(long)


def clipped(session: Session, limit: int, prefix_tokens: int) -> Session:
    """With turns of at most an equal share of the room."""
    shared = prefix_tokens if session.prefix is not None else 0
    share = (limit - shared) // len(session.turns)
    if share < 2:
        raise ValueError(f"a context of {limit} tokens has no room for these turns and prefixes")
    turns = []
    for turn in session.turns:
        output = min(turn.output, share - 1)
        turns.append(Lengths(min(turn.prompt, share - output), output))
    return replace(session, turns=tuple(turns))
