"""Throughput of the engine core alone: no services, no tokenizer, all requests at once.

    python -m benchmarks.engine --model llama3-8b --load-format dummy --gpu-kv-blocks 1650 \
        --workload 1000x200 --requests 200

One line a workload: requests and output tokens per second of the whole run and of its middle 60%
(from the end of the first fifth of the requests to that of the fourth), and where the time went:
device time of iterations with and without prompt chunks, and time in which the device had nothing
to do.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.host_tier import cpu_service
from gpu_service.config import GpuServiceConfig
from gpu_service.engine.build import build_core
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import SamplingSpec, Submit
from gpu_service.scheduling.plan import IterationPlan, SweepResult
from gpu_service.scheduling.scheduler import Scheduler
from gpu_service.scheduling.steering import Accounts
from neo_client.fingerprint import fingerprint
from neo_client.workloads import Lengths, read_workload
from neo_plan.catalog import model_folder


@dataclass
class Phases:
    """Where an engine's time went; fed with every iteration."""

    prefill_seconds: float = 0.0
    """Device time of iterations with prompt chunks."""
    decode_seconds: float = 0.0
    """Device time of iterations without."""
    waited_seconds: float = 0.0
    """The engine's thread waited for the device."""
    iterations: int = 0
    decode_iterations: list[tuple[int, float]] = field(default_factory=list)
    """Rows and device seconds."""

    def observe(self, plan: IterationPlan, result: SweepResult, _: float) -> None:
        self.iterations += 1
        self.waited_seconds += result.waited_seconds
        if any(batch.prefill for batch in plan.batches):
            self.prefill_seconds += result.device_seconds
        else:
            self.decode_seconds += result.device_seconds
            rows = sum(len(batch.gpu_decode) for batch in plan.batches)
            self.decode_iterations.append((rows, result.device_seconds))


def submit_all(
    core: EngineCore, lengths: Sequence[Lengths], seed: int, sampling: Mapping[str, Any]
) -> None:
    vocabulary = 30_000 if core.vocab_size > 30_000 else core.vocab_size - 3
    draw = random.Random(seed)
    for number, request in enumerate(lengths):
        core.handle(
            Submit(
                request_id=f"r{number}",
                prompt_token_ids=[3 + draw.randrange(vocabulary) for _ in range(request.prompt)],
                sampling=SamplingSpec(
                    **{"temperature": 0.0, "seed": number, **sampling},
                    max_tokens=request.output,
                    ignore_eos=True,
                ),
                arrival=time.monotonic(),
            )
        )


def run(
    core: EngineCore, lengths: Sequence[Lengths], seed: int, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Submit everything and run until all is done. `sampling`: fields of `SamplingSpec`."""
    phases = Phases()
    core.observe = phases.observe
    core.scheduler.steering.accounts = Accounts()
    submit_all(core, lengths, seed, sampling)
    ends: list[float] = []
    tokens = host_tokens = 0
    started = time.perf_counter()
    while core.scheduler.live_requests:
        output = core.step()
        if output is None:
            continue
        assert not output.refusals, output.refusals
        for usage in output.usages:
            ends.append(time.perf_counter() - started)
            tokens += usage.completion_tokens
            host_tokens += usage.host_tokens
    seconds = time.perf_counter() - started
    while core.made_progress:
        core.step()  # what was launched ahead of the last results
    assert tokens == sum(request.output for request in lengths), "tokens are missing"
    first, last = ends[len(ends) // 5], ends[-(len(ends) // 5) - 1]
    middle = (len(ends) - 2 * (len(ends) // 5) - 1) / (last - first) if last > first else 0.0
    busy = phases.prefill_seconds + phases.decode_seconds
    return {
        "requests": len(lengths),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(lengths) / seconds, 3),
        "middle_requests_per_second": round(middle, 3),
        "output_tokens_per_second": round(tokens / seconds, 1),
        "host_tokens": host_tokens,
        "iterations": phases.iterations,
        "prefill_seconds": round(phases.prefill_seconds, 3),
        "decode_seconds": round(phases.decode_seconds, 3),
        "device_idle_seconds": round(seconds - busy, 3),
        "host_busy_seconds": round(seconds - phases.waited_seconds, 3),
        "decode_iteration_ms": _decode_times(phases),
        "decisions": decisions(core, seconds),
    }


def gpu_only(core: EngineCore) -> EngineCore:
    """Another core over the same model and pools whose requests stay on the GPU tier; either may
    run while the other has no request."""
    steering = core.scheduler.steering
    limits = replace(
        core.scheduler.limits, offload="never", host_blocks=0, auto=False, cohorts=0,
        asymmetric=False, staged_prompts=False,
    )  # fmt: skip
    costs = None if steering.predictor is None else copy.deepcopy(steering.predictor.costs)
    return EngineCore(Scheduler(limits, costs), core.runner, core.host, core.vocab_size)


def decisions(core: EngineCore, seconds: float) -> dict[str, Any]:
    """How iterations ran, whether that was foreseen, and how long the host had nothing to do."""
    steering = core.scheduler.steering
    accounts, decision = steering.accounts, core.scheduler.state.decision
    found: dict[str, Any] = {
        "iterations": {way: count for way, count in accounts.iterations.items() if count},
        "streamed_iterations": accounts.streamed_iterations,
        "predicted_sweep_seconds": round(1e-3 * accounts.predicted.total, 3),
        "actual_sweep_seconds": round(1e-3 * accounts.actual_ms, 3),
        "predicted_gpu_seconds": round(1e-3 * accounts.predicted.gpu, 3),
        "predicted_cpu_seconds": round(1e-3 * accounts.predicted.cpu, 3),
        "actual_cpu_seconds": round(accounts.cpu_busy_seconds, 3),
        "predicted_link_seconds": round(1e-3 * accounts.predicted.link, 3),
        "relative_error": round(accounts.error, 4),
        "cpu_idle_share": round(1 - accounts.cpu_busy_seconds / seconds, 4),
    }
    if steering.predictor is not None:
        rates = msgspec.to_builtins(steering.predictor.rates)
        found["rates_ms"] = {name: float(f"{value:.4g}") for name, value in rates.items()}
        found["thread_ms_beside_sweeps"] = round(steering.predictor.beside_ms(True), 3)
    if decision is not None:
        found["last_decision"] = decision.why
    return found


def _decode_times(phases: Phases) -> dict[int, float]:
    """Rows -> median device milliseconds of iterations without prompt chunks."""
    by_rows: dict[int, list[float]] = {}
    for rows, seconds in phases.decode_iterations:
        by_rows.setdefault(rows, []).append(seconds)
    common = sorted(by_rows, key=lambda rows: -len(by_rows[rows]))[:5]
    return {
        rows: round(1e3 * sorted(by_rows[rows])[len(by_rows[rows]) // 2], 3)
        for rows in sorted(common)
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="llama3-8b", help="of neo_plan/models, or a path")
    made.add_argument("--load-format", default="dummy")
    made.add_argument("--quantization", default="auto")
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto")
    made.add_argument("--gpu-kv-blocks", type=int, default=0)
    made.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    made.add_argument("--max-batch-tokens", type=int, default=0)
    made.add_argument("--max-running-requests", type=int, default=256)
    made.add_argument("--workload", action="append", help="INxOUT or lengths; repeatable")
    made.add_argument(
        "--sampling", action="append", help='such as {"temperature": 0.8}; repeatable; {} is greedy'
    )
    made.add_argument("--requests", type=int, default=200)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--offload", default="never", choices=("never", "auto", "always"))
    made.add_argument(
        "--offload-mode", default="auto", choices=("auto", "inline", "deferred", "asymmetric")
    )
    made.add_argument("--host-kv-gib", type=float, default=8.0)
    made.add_argument("--host-kv-dtype", default="auto")
    made.add_argument("--streamed-kv-blocks", type=int, default=0)
    made.add_argument("--cpu-threads", type=int, default=0, help="0: all cores but two")
    made.add_argument(
        "--gpu-only-too", action="store_true",
        help="before each workload the same with the GPU tier alone, on the same engine; its ratio",
    )  # fmt: skip
    made.add_argument("--json", type=Path, help="write all figures here")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.gpu_only_too and args.streamed_kv_blocks:
        raise SystemExit("--gpu-only-too: without --streamed-kv-blocks the GPU has more blocks")
    with open_engine(args) as core:
        figures = _measure(args, core)
    if args.json:
        options = {k: str(v) for k, v in vars(args).items()}
        found = {"machine": fingerprint(), "options": options, "figures": figures}
        args.json.write_text(json.dumps(found, indent=1))


@contextmanager
def open_engine(args: argparse.Namespace) -> Iterator[EngineCore]:
    """As the options of `parser` say, with a cpu_service where there is a host tier."""
    with ExitStack() as stack:
        folder = stack.enter_context(model_folder(args.model))
        services: tuple[str, ...] = ()
        if args.offload != "never":
            services = (stack.enter_context(cpu_service(args.cpu_threads)),)
        config = GpuServiceConfig(
            model=folder,
            device=args.device,
            dtype=args.dtype,
            load_format=args.load_format,
            quantization=args.quantization,
            gpu_kv_blocks=args.gpu_kv_blocks,
            gpu_memory_utilization=args.gpu_memory_utilization,
            offload=args.offload,
            offload_mode=args.offload_mode,
            cpu_services=services,
            host_kv_gib=args.host_kv_gib,
            host_kv_dtype=args.host_kv_dtype,
            streamed_kv_blocks=args.streamed_kv_blocks if services else 0,
            max_batch_tokens=args.max_batch_tokens,
            max_running_requests=args.max_running_requests,
            max_waiting_requests=1 << 20,
        )
        began = time.perf_counter()
        built = build_core(config, _progress)
        print(f"ready after {time.perf_counter() - began:.1f} s: {built.ready}", file=sys.stderr)
        try:
            yield built.core
        finally:
            built.core.close()


def _measure(args: argparse.Namespace, core: EngineCore) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    alone = gpu_only(core) if args.gpu_only_too else None
    run(core, read_workload("64x8", min(args.requests, 32)), args.seed + 1, {})  # warm up
    for workload, sampling in itertools.product(
        args.workload or ["1000x200"], args.sampling or ["{}"]
    ):
        name = workload if sampling == "{}" else f"{workload} {sampling}"
        lengths = read_workload(workload, args.requests, args.seed)
        given = (lengths, args.seed, json.loads(sampling))
        if alone is not None:
            figures[f"{name} alone"] = run(alone, *given)
            print(f"{args.model} {name} alone: {json.dumps(figures[f'{name} alone'])}", flush=True)
        figures[name] = run(core, *given)
        if alone is not None:
            figures[name]["ratio"] = _ratio(figures[name], figures[f"{name} alone"])
        print(f"{args.model} {name}: {json.dumps(figures[name])}", flush=True)
    return figures


def _ratio(found: dict[str, Any], alone: dict[str, Any]) -> dict[str, float]:
    """Of rates: the whole run's, and the middle's."""
    rates = ("requests_per_second", "middle_requests_per_second")
    return {rate: round(found[rate] / alone[rate], 4) for rate in rates if alone[rate]}


def _progress(stage: str, done: int, total: int) -> None:
    if done in (0, total):
        print(f"{time.strftime('%X')} {stage}: {done} of {total}", file=sys.stderr)


if __name__ == "__main__":
    main()
