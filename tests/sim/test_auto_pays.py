"""What offload mode auto decides, by throughput in simulation: never less than the GPU alone or the
best fixed mode, but for a fiftieth."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import msgspec
import pytest

from benchmarks import simulate as command
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.decision import Decision
from gpu_service.scheduling.demand import Demand
from gpu_service.scheduling.mode import decide
from gpu_service.scheduling.predictor import Predictor
from gpu_service.scheduling.rates import HostRates
from gpu_service.scheduling.work import DEFERRED, GPU_ONLY
from neo_client.workloads import Lengths, read_workload
from neo_plan.simulator.machine import Machine
from neo_plan.simulator.run import Trace, simulate
from tests.support.fake_model import limits

SHARE = 0.98
SMALL = "--gpu-kv-blocks 330 --max-running-requests 512"
A = "--gpu-kv-blocks 1650 --max-running-requests 512"
HOST = "--host-kv-blocks 14000"
B = "--model llama2-7b --gpu-kv-blocks 54 --max-running-requests 512 --host-kv-blocks 4000"
WHOLE_CARD = "--gpu-kv-blocks 27806 --max-running-requests 512 --requests 600"


@functools.cache
def throughput(options: str, workload: str) -> float:
    found = command.run(command.parser().parse_args(options.split()), workload)
    return float(found["requests_per_second"])


def check_pays(options: str, workload: str, *modes: str) -> float:
    """Returns what auto brings, of what the GPU alone does."""
    auto = throughput(f"{options} --offload-mode auto", workload)
    never = throughput(f"{options} --offload never", workload)
    assert auto >= SHARE * never
    for mode in modes:
        assert auto >= SHARE * throughput(f"{options} --offload-mode {mode}", workload)
    return auto / never


@pytest.mark.parametrize(("workload", "gain"), [("1000x20", 1.0), ("500x100", 1.02)])
def test_auto_pays_on_a_small_card(workload: str, gain: float) -> None:
    assert check_pays(f"{SMALL} {HOST} --requests 120", workload, "deferred") >= gain


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "int8"])
@pytest.mark.parametrize(
    ("options", "workload"),
    [
        *((f"{A} {HOST} --requests 600", f"1000x{out}") for out in (50, 100, 200, 400, 1000)),
        (f"{A} {HOST} --requests 600 --streamed-kv-blocks 200", "1000x200"),
        (f"{B} --requests 600", "osc_lengths"),
        (f"{B} --requests 600 --streamed-kv-blocks 40", "osc_lengths"),
        (f"{WHOLE_CARD} {HOST}", "1000x200"),
    ],
)
def test_auto_pays(options: str, workload: str, kind: str) -> None:
    check_pays(f"{options} --host-kv-dtype {kind}", workload, "deferred")


@pytest.mark.parametrize("staging", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_the_last_ones_on_the_host_go_on(staging: int) -> None:
    """On a card with room for one prompt: they may be too near to their end to be promoted, and
    fewer than a sweep was planned for; or too large for the GPU tier, and nobody else is left."""
    requests = 120 if staging == 40 else 600
    options = f"{B} --requests {requests} --streamed-kv-blocks {staging}"
    never = f"{B} --requests 60 --offload never"
    assert throughput(options, "osc_lengths") > 1.5 * throughput(never, "osc_lengths")


def test_more_host_memory_never_lowers_throughput() -> None:
    found = [
        throughput(f"{SMALL} --requests 120 --host-kv-blocks {blocks}", "500x100")
        for blocks in (0, 500, 2000, 8000)
    ]
    for less, more in itertools.pairwise(found):
        assert more >= SHARE * less, found
    assert found[-1] > 1.02 * found[0], found


def run(rates_factor: float = 1.0) -> tuple[Trace, Machine, Any]:
    """A run whose first idea of the host is wrong by a factor."""
    node = command.node_of(command.parser().parse_args(f"{SMALL} {HOST}".split()))
    machine = node.machine()
    right = machine.start_rates()

    class Mistaken(Machine):
        def start_rates(self) -> HostRates:
            numbers = msgspec.structs.asdict(right).items()
            return HostRates(**{name: rates_factor * value for name, value in numbers})

    machine.__class__ = Mistaken
    lengths = read_workload("500x100", 120)
    seen: list[Any] = []
    trace = simulate(machine, node.limits(), lengths, [0.0] * len(lengths), seen.append)
    return trace, machine, seen[0]


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_a_wrong_first_profile_comes_right(factor: float) -> None:
    exact, machine, _ = run()
    wrong, _, core = run(factor)
    right = Machine.start_rates(machine)
    predictor = core.scheduler.steering.predictor
    assert predictor.rates.cpu_token_ms == pytest.approx(right.cpu_token_ms, rel=0.05)
    assert predictor.rates.deferred_ms == pytest.approx(right.deferred_ms, abs=0.25)
    assert predictor.error < 0.08
    assert wrong.seconds <= exact.seconds / 0.96


def test_the_host_hides_behind_the_device() -> None:
    """Deferred sweeps wait for the host for no more than a twentieth of their time, though it is
    busy most of it; and were its rows more, they would."""
    trace, _, core = run()
    sweeps = [s.time for s in trace.sweeps if s.time.mode == DEFERRED]
    total = sum(time.total for time in sweeps)
    waited = sum(time.total - time.gpu for time in sweeps)
    assert total > 0.5e3 * trace.seconds
    assert waited < 0.05 * total
    accounts = core.scheduler.steering.accounts
    assert accounts.predicted.total == pytest.approx(accounts.actual_ms, rel=0.03)
    assert accounts.cpu_busy_seconds == pytest.approx(1e-3 * sum(t.cpu for t in sweeps), rel=1e-6)


# -- the decision alone ----------------------------------------------------------------------

COSTS = SweepCosts({1: 7.0, 64: 7.5}, {64: 8.0, 256: 10.0}, 5e-5)
RATES = HostRates(
    cpu_token_ms=1.2e-3, link_token_ms=2.5e-3, streamed_token_ms=2.5e-3, deferred_ms=0.35
)
LIMITS = limits(cohorts=33, cohort_rows=16, auto=True, inline=False, host_prefill=False)
CROWD = Demand(
    choices=500, gpu_rows=22, context=1100, prompt=1000, output=200, host_choices=600,
    host_context=1100, queued=True, waiting=300, on_host=100,
)  # fmt: skip


def decided(demand: Demand = CROWD, before: Decision | None = None, **changes: float) -> Decision:
    rates = msgspec.structs.replace(RATES, **changes)
    predictor = Predictor(COSTS, rates)
    return decide(demand, predictor, LIMITS, before or Decision(), must_offload=False)


def with_(**changes: Any) -> Demand:
    return dataclasses.replace(CROWD, **changes)


def test_a_crowd_is_shared_with_the_host() -> None:
    found = decided()
    assert found.way == DEFERRED
    # No more than the host reads while the device is busy.
    assert 4 < found.host_rows < 9
    assert found.host_tokens * RATES.cpu_token_ms <= 1.02 * found.sweep_ms
    assert found.resident_tokens == pytest.approx(33 * found.host_tokens)
    assert found.rate > 1.05 * found.gpu_only_rate


def test_cohorts_follow_the_host_s_speed_and_its_memory() -> None:
    fast, slow = decided(cpu_token_ms=0.6e-3), decided(cpu_token_ms=2.0e-3)
    assert fast.host_rows > 1.4 * decided().host_rows
    assert decided().host_rows > 1.4 * slow.host_rows > 0
    small = decided(with_(host_choices=66))
    assert small.host_rows == pytest.approx(2), "a pool of two rows for each layer"


@pytest.mark.parametrize(
    "found",
    [
        decided(with_(queued=False)),
        decided(with_(host_choices=0)),
        decided(with_(host_choices=10)),  # a third of a row a sweep
        decided(cpu_token_ms=1.0),
        decided(cpu_token_ms=float("inf")),
        decided(deferred_ms=5.0),
        # Nobody will wait for long enough to make a move worth its copy.
        decided(with_(waiting=2, on_host=0)),
    ],
)
def test_the_gpu_alone(found: Decision) -> None:
    assert found.way == GPU_ONLY
    assert found.resident_tokens == found.host_tokens == 0
    assert found.why


@pytest.mark.parametrize("way", ["inline", "asymmetric"])
def test_copies_beside_sweeps_that_wait_for_their_rows_are_not_free(way: str) -> None:
    """A sweep lasts at least as long as its share of the moves."""
    bounds = dataclasses.replace(
        LIMITS, cohorts=0, inline=way == "inline", asymmetric=way == "asymmetric",
        copies_beside=True,
    )  # fmt: skip

    def found(link_token_ms: float) -> Decision:
        rates = msgspec.structs.replace(
            RATES, cpu_token_ms=1e-4, link_token_ms=link_token_ms, streamed_token_ms=link_token_ms
        )
        predictor = Predictor(COSTS, rates)
        return decide(with_(on_host=0), predictor, bounds, Decision(), must_offload=False)

    quick, slow = found(1e-6), found(10.0)
    assert quick.way == way
    assert quick.host_rows > 0
    assert slow.way == GPU_ONLY, "a move takes eleven seconds"


def test_what_has_begun_ends_only_where_it_costs() -> None:
    """A gain within the predictor's error begins nothing, and ends nothing."""
    little = next(
        {"deferred_ms": ms}
        for ms in (0.1 * step for step in range(60))
        if 1.0 < decided(deferred_ms=ms, before=decided()).rate / decided().gpu_only_rate < 1.01
    )
    assert decided(**little).way == GPU_ONLY
    assert decided(before=decided(), **little).way == DEFERRED


def test_six_requests_share_the_tiers_as_well_as_any_fixed_split() -> None:
    """Against each way to have some of them on the host tier from their start to their end."""
    options = "--model tiny --gpu-kv-blocks 24 --host-kv-blocks 200 --offload-mode deferred"
    node = command.node_of(command.parser().parse_args(options.split()))
    machine, bounds = node.machine(), node.limits()
    lengths = [Lengths(60 + 40 * (i % 3), 40 + 30 * (i % 2)) for i in range(6)]
    times = []
    for on_host in itertools.product((False, True), repeat=6):
        places = ["cpu_preferred" if here else "gpu_only" for here in on_host]
        times.append(simulate(machine, bounds, lengths, [0.0] * 6, placements=places).seconds)
    auto = dataclasses.replace(bounds, auto=True, inline=False)
    found = simulate(machine, auto, lengths, [0.0] * 6).seconds
    assert found <= 1.02 * min(times), (found, sorted(times)[:3])
