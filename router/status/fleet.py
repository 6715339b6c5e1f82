"""What the status page shows, once a second, as plain data.

history: [point, point, ...]            the last two minutes, oldest first
backends: [{address, state, ...}]       as of the newest snapshots
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from protos.neo.v1 import engine_pb2 as engine
from router.backend import Backend
from router.status.recent import Calls

HISTORY_SECONDS = 120
MODE_WINDOW_SECONDS = 10
"""What the shares of modes look back."""
SHARES = ("device_busy", "host_busy", "host_wait")
HOST_STATES = {
    engine.HOST_TIER_STATE_OFF: "off",
    engine.HOST_TIER_STATE_UP: "up",
    engine.HOST_TIER_STATE_DEGRADED: "degraded",
}


@dataclass(frozen=True)
class Seen:
    """Totals of one backend at one look."""

    at: float
    instance: str
    tokens: int
    mode_seconds: dict[str, float]
    device_busy_seconds: float
    host_wait_seconds: float
    host_busy_seconds: float


class Fleet:
    """Looked at once a second; keeps what differences need. Used by one event loop."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[Seen]] = {}
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY_SECONDS)

    def look(self, backends: Sequence[Backend], calls: Calls, now: float) -> dict[str, Any]:
        """`now`: the clock of the backends' snapshots."""
        addresses = {backend.address for backend in backends}
        self._seen = {key: seen for key, seen in self._seen.items() if key in addresses}
        rows = [self._row(backend, now) for backend in backends]
        self._history.append(_point(rows, calls))
        return {"history": list(self._history), "backends": rows}

    def _row(self, backend: Backend, now: float) -> dict[str, Any]:
        state, problem = backend.assess(now)
        row: dict[str, Any] = {
            "address": backend.address,
            "state": state.value,
            "problem": problem,
            "models": list(backend.models),
            "in_flight": backend.in_flight,
            "calls": backend.calls_total,
            "failures": backend.failures_total,
        }
        load = backend.load
        if load is None:
            return row
        seen = self._remember(backend.address, load, backend.load_at)
        return row | {
            "age_seconds": max(now - backend.load_at, 0.0),
            "waiting": load.waiting_requests,
            "waiting_limit": load.max_waiting_requests,
            "host_tier": HOST_STATES.get(load.host_tier_state, "unknown"),
            "tiers": {"gpu": _tier(load.gpu, load), "host": _tier(load.host, load)},
            "migrations": load.demotions_total + load.promotions_total,
            "recomputations": load.recomputations_total,
            "decision": _decision(load),
            **_rates(seen),
        }

    def _remember(self, address: str, load: engine.LoadSnapshot, at: float) -> deque[Seen]:
        seen = self._seen.setdefault(address, deque(maxlen=MODE_WINDOW_SECONDS + 1))
        if seen and seen[-1].instance != load.instance_id:
            seen.clear()  # it has started again, from 0
        if not seen or at > seen[-1].at:
            seen.append(
                Seen(
                    at=at,
                    instance=load.instance_id,
                    tokens=load.gpu.tokens_total + load.host.tokens_total,
                    mode_seconds=dict(load.mode_seconds_total),
                    device_busy_seconds=load.device_busy_seconds_total,
                    host_wait_seconds=load.host_wait_seconds_total,
                    host_busy_seconds=load.host_busy_seconds_total,
                )
            )
        return seen


def _decision(load: engine.LoadSnapshot) -> dict[str, str] | None:
    """None where a setting says how host rows run."""
    if not load.HasField("decision"):
        return None
    return {"mode": load.decision.mode, "why": load.decision.why}


def _tier(tier: engine.TierLoad, load: engine.LoadSnapshot) -> dict[str, int]:
    return {
        "running": tier.running_requests,
        "total_tokens": tier.total_blocks * load.block_tokens,
        "used_tokens": (tier.total_blocks - tier.free_blocks) * load.block_tokens,
    }


def _rates(seen: Sequence[Seen]) -> dict[str, Any]:
    """Over the last second, and shares of modes over the whole window."""
    if len(seen) < 2:
        return {"tokens_per_second": 0.0, "modes": {}} | dict.fromkeys(SHARES, 0.0)
    first, before, last = seen[0], seen[-2], seen[-1]
    span, step = last.at - first.at, last.at - before.at
    modes = {
        mode: (seconds - first.mode_seconds.get(mode, 0.0)) / span
        for mode, seconds in sorted(last.mode_seconds.items())
    }
    return {
        "tokens_per_second": (last.tokens - before.tokens) / step,
        "modes": modes,
        **{
            name: (getattr(last, f"{name}_seconds") - getattr(first, f"{name}_seconds")) / span
            for name in SHARES
        },
    }


def _point(rows: Sequence[dict[str, Any]], calls: Calls) -> dict[str, Any]:
    """The fleet as one, for the graphs."""
    known = [row for row in rows if "tiers" in row]
    running = {
        tier: sum(row["tiers"][tier]["running"] for row in known) for tier in ("gpu", "host")
    }
    return {
        "tokens_per_second": sum(row["tokens_per_second"] for row in known),
        "running_gpu": running["gpu"],
        "running_host": running["host"],
        "waiting": sum(row["waiting"] for row in known),
        **asdict(calls),
    }
