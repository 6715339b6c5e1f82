"""Hours under load and faults, and whether anything grew, leaked or went wrong.

    python -m benchmarks.soak --minutes 120 --json soak.json

Two routers, two gpu_services with a cpu_service each (CPU devices, a tiny random model, forced
migrations, all offload modes), driven by an open loop at 80% of what a closed loop got through.
Requests are drawn from a finite set whose answers an unfaulted engine gave beforehand, and every
answer is compared. Meanwhile processes are killed, stopped and restarted, one fault after the
other, drawn from `--seed`. The rate goes down where the queue grows without a fault (the machine
may do other things) and up again later. `benchmarks/soak/verdict.py` says what must be flat; the
exit code is 1 when something is not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.soak.asks import Asker, questions
from benchmarks.soak.drive import Driver, Window
from benchmarks.soak.faults import Faults
from benchmarks.soak.fleet import Fleet, Unready, running_fleet
from benchmarks.soak.golden import known_answers
from benchmarks.soak.model import write_model
from benchmarks.soak.verdict import verdict
from benchmarks.soak.watch import look, probe_ms
from neo_client.connect import Connection, Retries
from neo_client.fingerprint import fingerprint
from protos.neo.v1 import inference_pb2_grpc

WORKERS = 12
"""Of the closed loop that finds the capacity."""
LOAD = 0.8
IDLE_EVERY = 3
"""Faults between idle windows."""
IDLE_SECONDS = 20.0


class Soak:
    """One run over a healthy fleet."""

    def __init__(self, fleet: Fleet, driver: Driver, faults: Faults, window_seconds: float) -> None:
        self.fleet = fleet
        self.driver = driver
        self.faults = faults
        self.window_seconds = window_seconds
        self.base_rate = self.rate = 0.0
        self.windows: list[dict[str, Any]] = []
        self.held: list[dict[str, Any]] = []
        self.idle: list[dict[str, Any]] = []

    async def run(self, seconds: float, calibration: float, gap: float) -> None:
        """Raises Unready when the fleet does not recover."""
        capacity = await self.driver.closed_loop(WORKERS, calibration)
        self.base_rate = self.rate = LOAD * capacity
        print(f"capacity {capacity:.1f} asks/s, driven at {self.rate:.1f}", flush=True)
        self.driver.take_window()
        watching = asyncio.create_task(self._watch())
        faulting = asyncio.create_task(self._fault(seconds, gap))
        loading = asyncio.create_task(
            self.driver.open_loop(lambda: self.rate, seconds, self.faults.seed + 1)
        )
        try:
            await asyncio.wait({faulting, loading}, return_when=asyncio.FIRST_EXCEPTION)
            await faulting
            await loading
            await self._idle_window()
        finally:
            for task in (watching, faulting, loading):
                task.cancel()
            await asyncio.gather(watching, faulting, loading, return_exceptions=True)

    async def _fault(self, seconds: float, gap: float) -> None:
        """Until there is no time for another one and its recovery."""
        while self.faults.now() + gap < seconds:
            await asyncio.sleep(gap)
            fault = await self.faults.inject()
            assert fault.healthy is not None
            print(
                f"{fault.begun:7.0f} s {fault.kind}, held {fault.hold_seconds:.1f} s, healthy "
                f"after {fault.healthy - fault.begun:.1f} s",
                flush=True,
            )
            if len(self.faults.log) % IDLE_EVERY == 0:
                await self._idle_window()

    async def _idle_window(self) -> None:
        await self.driver.pause()
        at = self.faults.now()
        blocks = await self.fleet.idle_blocks(IDLE_SECONDS)
        held = {sample.name: asdict(sample) for sample in look(self.fleet, self.faults.now())}
        self.idle.append({"at": round(at, 1), "blocks": blocks, "held": held})
        if any(blocks.values()):
            self.driver.fail("blocks", f"in use while idle: {blocks}")
        self.driver.resume()

    async def _watch(self) -> None:
        while True:
            calm = self.faults.calm
            await asyncio.sleep(self.window_seconds)
            window = self.driver.take_window()
            at = self.faults.now()
            row = _row(window, self.window_seconds)
            row.update(
                at=round(at, 1), calm=calm and self.faults.calm, rate=round(self.rate, 2),
                in_flight=self.driver.in_flight, probe_ms=round(probe_ms(), 2),
                load_average=round(os.getloadavg()[0], 2),
            )  # fmt: skip
            self.windows.append(row)
            self.held += [asdict(sample) for sample in look(self.fleet, at)]
            self._steer(row)
            if len(self.windows) % 6 == 0:
                self._say(row)

    def _steer(self, row: dict[str, Any]) -> None:
        """Down when more waits than the closed loop ever had, and no fault explains it."""
        if row["in_flight"] > 3 * WORKERS and row["calm"]:
            self.rate *= 0.8
        elif row["in_flight"] < WORKERS:
            self.rate = min(self.base_rate, 1.05 * self.rate)

    def _say(self, row: dict[str, Any]) -> None:
        heap = {s["name"]: s["heap"] for s in self.held[-10:] if s["at"] == self.held[-1]["at"]}
        e2e = row["e2e_ms"] or {"p50": 0, "p99": 0}
        print(
            f"{row['at']:7.0f} s rate {row['rate']:.1f}, in flight {row['in_flight']}, e2e p50 "
            f"{e2e['p50']:.0f} p99 {e2e['p99']:.0f} ms, load {row['load_average']}, compared "
            f"{self.driver.checked}, {dict(self.driver.total)}, failed {dict(self.driver.failed)}, "
            f"heap MiB {heap}",
            flush=True,
        )

    def result(self) -> dict[str, Any]:
        driver = self.driver
        return {
            "machine": fingerprint(), "seed": self.faults.seed, "base_rate": self.base_rate,
            "ends": dict(driver.total), "excused": dict(driver.excused),
            "checked": driver.checked, "failed": dict(driver.failed),
            "failures": driver.failures, "faults": self.faults.as_json(), "idle": self.idle,
            "windows": self.windows, "held": self.held,
        }  # fmt: skip


def _row(window: Window, seconds: float) -> dict[str, Any]:
    return {
        "ends": dict(window.ends), "left_out": window.left_out,
        "tokens_per_second": round(window.tokens / seconds, 1),
        "host_tokens_per_second": round(window.host_tokens / seconds, 1),
        "ttft_ms": _quantiles(window.ttft_ms), "e2e_ms": _quantiles(window.e2e_ms),
    }  # fmt: skip


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        f"p{part}": round(ordered[min(len(ordered) - 1, part * len(ordered) // 100)], 2)
        for part in (50, 95, 99)
    }


async def soak(args: argparse.Namespace, folder: Path) -> int:
    write_model(folder / "model", args.seed)
    async with contextlib.AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(running_fleet(folder, folder / "model"))
        asked = questions(args.questions, args.seed)
        gpu = await stack.enter_async_context(Connection(fleet.gpus[0].address).open_aio())
        known = await known_answers(inference_pb2_grpc.InferenceServiceStub(gpu), asked)
        print(f"seed {args.seed}: {len(known)} of {len(asked)} questions have known answers")
        asker = Asker([q for q in asked if q.number in known], args.seed)
        connection = Connection(fleet.address, retries=Retries())
        channel = await stack.enter_async_context(connection.open_aio())
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        faults = Faults(fleet, args.seed, lambda kind, what: driver.fail(kind, what))
        driver = Driver(stub, asker, known, faults.excuse)
        run = Soak(fleet, driver, faults, args.window)
        seconds = 60 * args.minutes
        calibration = min(30.0, seconds / 8)
        try:
            await run.run(seconds, calibration, args.gap or min(40.0, seconds / 8))
        except Unready as error:
            driver.fail("recovery", str(error))
    return report(run.result(), args.json)


def report(result: dict[str, Any], path: Path | None) -> int:
    checks = verdict(result)
    result["verdict"] = [asdict(check) for check in checks]
    if path is not None:
        path.write_text(json.dumps(result, indent=1))
    print(f"ends {result['ends']}\nexcused by faults {result['excused']}")
    by_kind: dict[str, list[float]] = {}
    for fault in result["faults"]:
        if fault["healthy"] is not None:
            late = fault["healthy"] - fault["begun"] - fault["hold_seconds"]
            by_kind.setdefault(fault["kind"], []).append(late)
    for kind, seconds in sorted(by_kind.items()):
        print(f"{kind}: {len(seconds)} times, healthy {max(seconds):.1f} s after it at most")
    for check in checks:
        print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.said}")
    return 0 if all(check.passed for check in checks) else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120.0, help="of load, after calibration")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of everything drawn")
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--gap", type=float, help="seconds between faults; default 40, or less")
    parser.add_argument("--window", type=float, default=10.0, help="seconds between samples")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--folder", type=Path, help="for logs, kept; default: a temporary one")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = args.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="neo-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        return asyncio.run(soak(args, folder))


if __name__ == "__main__":
    sys.exit(main())
