"""The two ways to run a point of a figure: the real engine of this machine, and the simulator."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks import engine as real
from benchmarks import simulate as command
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import SamplingSpec, Submit
from neo_client.workloads import Lengths
from neo_plan.node import SPARE_CORES, with_cores
from neo_plan.simulator.run import simulate

WARM_UP = [Lengths(64, 8)] * 8


@dataclass(frozen=True)
class Case:
    """A model on a card of some size, with a host tier."""

    model: str
    gpu_kv_blocks: int
    host_kv_gib: float
    host_kv_dtype: str
    max_running_requests: int


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    seconds: float
    latencies: list[float]
    """Of each request, in the order of arrival: seconds from its arrival to its last token, for
    each of its output tokens."""


class Runs(Protocol):
    """`offload`: whether there is a host tier. `threads`: of the host's attention; 0: the machine's
    own choice. `arrivals`: seconds since the start, ascending."""

    simulated: bool

    def run(
        self,
        case: Case,
        offload: bool,
        threads: int,
        lengths: Sequence[Lengths],
        arrivals: Sequence[float],
    ) -> Outcome: ...


class SimulatedRuns:
    """On a profile, whose CPU is replaced by one with so many cores for its attention."""

    simulated = True

    def __init__(self, profile: str) -> None:
        self._profile = profile

    def run(
        self,
        case: Case,
        offload: bool,
        threads: int,
        lengths: Sequence[Lengths],
        arrivals: Sequence[float],
    ) -> Outcome:
        options = ["--profile", self._profile, "--model", case.model]
        options += ["--gpu-kv-blocks", str(case.gpu_kv_blocks)]
        options += ["--host-kv-dtype", case.host_kv_dtype]
        options += ["--max-running-requests", str(case.max_running_requests)]
        node = command.node_of(command.parser().parse_args(options))
        if offload:
            block_bytes = node.machine().host_kv_token_bytes * node.sizes.block_tokens
            node = dataclasses.replace(
                node, host_blocks=int(case.host_kv_gib * (1 << 30) / block_bytes)
            )
        if threads:
            profile = with_cores(node.profile, threads + SPARE_CORES)
            node = dataclasses.replace(node, profile=profile)
        trace = simulate(node.machine(), node.limits(), lengths, arrivals)
        lives = trace.lives
        return Outcome(trace.seconds, [(x.tokens[-1] - x.arrival) / len(x.tokens) for x in lives])


class RealRuns:
    """The engine on this machine, with random weights; one engine for each combination."""

    simulated = False

    def __init__(self, device: str) -> None:
        self._device = device

    def run(
        self,
        case: Case,
        offload: bool,
        threads: int,
        lengths: Sequence[Lengths],
        arrivals: Sequence[float],
    ) -> Outcome:
        args = real.parser().parse_args([])
        args.device, args.model, args.gpu_kv_blocks = self._device, case.model, case.gpu_kv_blocks
        args.offload = "auto" if offload else "never"
        args.cpu_threads = threads
        args.host_kv_gib, args.host_kv_dtype = case.host_kv_gib, case.host_kv_dtype
        args.max_running_requests = case.max_running_requests
        with real.open_engine(args) as core:
            serve(core, WARM_UP, [0.0] * len(WARM_UP))
            return serve(core, lengths, arrivals)


def serve(core: EngineCore, lengths: Sequence[Lengths], arrivals: Sequence[float]) -> Outcome:
    """Submit each request when it comes, until all are served."""
    draw = random.Random(0)
    vocabulary = max(core.vocab_size - 3, 1)
    begin, submitted = time.monotonic(), 0
    ends: dict[str, float] = {}
    while submitted < len(lengths) or core.scheduler.live_requests:
        now = time.monotonic() - begin
        while submitted < len(lengths) and arrivals[submitted] <= now:
            request = lengths[submitted]
            core.handle(
                Submit(
                    request_id=f"f{submitted}",
                    prompt_token_ids=[
                        min(3 + draw.randrange(vocabulary), core.vocab_size - 1)
                        for _ in range(request.prompt)
                    ],
                    sampling=SamplingSpec(
                        temperature=0.0, max_tokens=request.output, ignore_eos=True
                    ),
                    arrival=begin + arrivals[submitted],
                )
            )
            submitted += 1
        if not core.scheduler.live_requests:
            time.sleep(max(0.0, arrivals[submitted] - now))
            continue
        output = core.step()
        for usage in output.usages if output else ():
            ends[usage.request_id] = time.monotonic() - begin
        assert output is None or not output.refusals, output.refusals
    latencies = [
        (ends[f"f{i}"] - arrivals[i]) / request.output for i, request in enumerate(lengths)
    ]
    return Outcome(max(ends.values()), latencies)
