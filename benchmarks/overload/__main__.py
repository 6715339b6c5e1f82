"""What a server does with several times more than it can do.

    python -m benchmarks.overload --seconds 60 --json overload.json

A router and a gpu_service, real but for an engine that sleeps `--sweep-ms` after each iteration
(`benchmarks/overload/core.py`): so the engine is what is overloaded, not the CPUs that it shares
with the sender. A closed loop finds the capacity; open loops then offer `--loads` times that. The
mixes `long` (prompts as long as the context), `one` (a token in, a token out) and `cancels` (so
many requests a second that are given up at once, beside half of the capacity) follow. Exit code 1
when one of these does not hold:

- goodput is at least 90% of the best that any load of the same mix had
- every refusal is RESOURCE_EXHAUSTED with a reason and a delay; 99% come within `--refusal-ms`
- nothing waits longer in the queue than 1 s and half as long again as a full one takes at that
  goodput
- a request that comes within `--recovery` seconds of a load's end is served as fast as before
- in the end no block is in use
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.overload.core import PACE_MS
from benchmarks.overload.drive import Seen, Sender, Shape, goodput, quantiles
from benchmarks.router.processes import started, wait_ready
from benchmarks.soak.model import CONTEXT_TOKENS, write_model
from neo_client.fingerprint import fingerprint
from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import engine_pb2_grpc, inference_pb2_grpc

RUNNING = 4
WAITING = 16
SHAPES = {
    "usual": Shape(32, 10),
    "long": Shape(CONTEXT_TOKENS - 24, 8),
    "one": Shape(1, 1),
}
GOODPUT = 0.9


@dataclass
class Judged:
    """Figures by phase, and what does not hold."""

    args: argparse.Namespace
    phases: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def phase(self, name: str, seen: Seen, best: float, recovery: float) -> float:
        """Returns its goodput."""
        args = self.args
        rate = goodput(seen, args.seconds, args.seconds / 6)
        bound = 1.0 + 1.5 * (WAITING + RUNNING) / max(rate, 1e-3)
        row = {
            "phase": name, "offered_per_second": round(seen.offered / args.seconds, 1),
            "goodput_per_second": round(rate, 2), "ends": dict(seen.ends),
            "e2e_ms": quantiles(seen.e2e), "queue_ms": quantiles(seen.queue),
            "refusal_ms": quantiles(seen.refused), "retry_after_ms": quantiles(seen.retry_after),
            "recovery_seconds": round(recovery, 2), "sender_late_ms": round(1e3 * seen.late, 1),
            "load_average": round(os.getloadavg()[0], 2),
        }  # fmt: skip
        self.phases.append(row)
        print(json.dumps(row), flush=True)
        refusals = quantiles(seen.refused)
        self.check(name, rate >= GOODPUT * best, f"goodput {rate:.2f}/s of {best:.2f}")
        self.check(name, not seen.unexplained, f"{seen.unexplained} refusals say too little")
        others = set(seen.ends) - {"OK", "RESOURCE_EXHAUSTED/QUEUE_FULL"}
        self.check(name, not others, f"ends {others}")
        if refusals:
            self.check(name, refusals["p99"] <= args.refusal_ms, f"refusals took {refusals}")
        worst = max(seen.queue, default=0.0)
        self.check(name, worst <= bound, f"queued {worst:.1f} s, bound {bound:.1f}")
        self.check(name, recovery <= args.recovery, f"recovery took {recovery:.1f} s")
        return rate

    def check(self, name: str, holds: bool, said: str) -> None:
        if not holds:
            self.failures.append(f"{name}: {said}")


class Overload:
    def __init__(self, sender: Sender, watch: Any, judged: Judged) -> None:
        self._sender = sender
        self._engine = watch
        self._judged = judged
        self._args = judged.args

    async def run(self) -> None:
        for name, shape in SHAPES.items():
            if name not in self._args.mixes:
                continue
            alone = await self._alone(shape)
            best = await self._sender.closed(shape, RUNNING + 4, self._args.seconds / 2)
            capacity = best
            print(f"{name}: alone {1e3 * alone:.0f} ms, capacity {capacity:.2f}/s", flush=True)
            for load in self._args.loads:
                seen = await self._sender.open(shape, load * capacity, self._args.seconds)
                recovery = await self._recovered(shape, alone, seen.over)
                rate = self._judged.phase(f"{name} x{load:g}", seen, best, recovery)
                best = max(best, rate)
        if "cancels" in self._args.mixes:
            await self._cancels()
        used = await self._used_blocks()
        self._judged.check("end", used == 0, f"{used} blocks are in use")

    async def _cancels(self) -> None:
        shape, seconds = SHAPES["usual"], self._args.seconds
        alone = await self._alone(shape)
        capacity = await self._sender.closed(shape, RUNNING + 4, seconds / 2)
        quiet = await self._sender.open(shape, capacity / 2, seconds)
        storm = asyncio.create_task(self._sender.cancels(shape, self._args.cancels, seconds))
        seen = await self._sender.open(shape, capacity / 2, seconds)
        count, ends = await storm
        recovery = await self._recovered(shape, alone, seen.over)
        print(f"cancels: {count / seconds:.0f}/s, not in time {dict(ends)}", flush=True)
        best = goodput(quiet, seconds, seconds / 6)
        share = seen.ends["OK"] / max(seen.offered, 1)
        self._judged.phase(f"cancels {count / seconds:.0f}/s", seen, 0.0, recovery)
        said = f"{share:.2f} of the others ended well, {best:.2f}/s without the storm"
        self._judged.check("cancels", share >= GOODPUT, said)

    async def _alone(self, shape: Shape) -> float:
        """The median of three requests, one after the other."""
        seen = Seen()
        for _ in range(3):
            await self._sender.one(shape, seen, time.perf_counter())
        return sorted(seen.e2e)[1]

    async def _recovered(self, shape: Shape, alone: float, since: float) -> float:
        """Seconds after `since` when a request begins that takes no more than twice as long as
        alone."""
        while (began := time.perf_counter()) - since < 10 * self._args.recovery:
            seen = Seen()
            await self._sender.one(shape, seen, began)
            if seen.e2e and seen.e2e[0] <= 2 * alone:
                break
        return began - since

    async def _used_blocks(self) -> int:
        load: engine.LoadSnapshot = (await self._engine.GetLoad(engine.GetLoadRequest())).load
        return load.gpu.total_blocks - load.gpu.free_blocks


async def overload(args: argparse.Namespace, folder: Path, judged: Judged) -> None:
    write_model(folder / "model", 1)
    os.environ[PACE_MS] = str(args.sweep_ms)
    cpus = frozenset(os.sched_getaffinity(0))
    flags = [
        "--model", str(folder / "model"), "--device", "cpu", "--dtype", "float32",
        "--threads", "1", "--offload", "never", "--gpu-kv-blocks", "2048",
        "--max-running-requests", str(RUNNING), "--max-waiting-requests", str(WAITING),
        "--log-level", "warning",
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(started("benchmarks.overload.service", flags, cpus))
        wait_ready(gpu.address)
        through = ["--backends", gpu.address, "--log-level", "warning"]
        router = stack.enter_context(started("router", through, cpus))
        wait_ready(router.address)
        async with (
            grpc.aio.insecure_channel(router.address) as channel,
            grpc.aio.insecure_channel(gpu.address) as direct,
        ):
            sender = Sender(inference_pb2_grpc.InferenceServiceStub(channel), args.seed)
            watch = engine_pb2_grpc.EngineServiceStub(direct)
            await Overload(sender, watch, judged).run()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--loads", type=float, nargs="+", default=[2.0, 5.0, 10.0])
    parser.add_argument("--mixes", nargs="+", default=[*SHAPES, "cancels"])
    parser.add_argument("--cancels", type=float, default=1000.0, help="a second, in that mix")
    parser.add_argument("--sweep-ms", type=float, default=100.0, help="added to each iteration")
    parser.add_argument("--refusal-ms", type=float, default=1000.0)
    parser.add_argument("--recovery", type=float, default=10.0, help="seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    judged = Judged(args)
    with tempfile.TemporaryDirectory(prefix="neo-overload-") as folder:
        asyncio.run(overload(args, Path(folder), judged))
    if args.json is not None:
        options = {name: str(value) for name, value in vars(args).items()}
        found = {"machine": fingerprint(), "options": options, "phases": judged.phases}
        args.json.write_text(json.dumps({**found, "failures": judged.failures}, indent=1))
    print("\n".join(["FAIL", *judged.failures]) if judged.failures else "ok")
    return 1 if judged.failures else 0


if __name__ == "__main__":
    sys.exit(main())
