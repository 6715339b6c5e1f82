"""The simulator: against what was measured on its profile's machine, and against arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks import simulate as command
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import DecodeRow, IterationPlan, Mode, PrefillRow, SubBatch, Tier
from gpu_service.scheduling.rates import HostRates
from neo_client.workloads import Lengths, read_workload
from neo_client.workloads.arrivals import poisson
from neo_plan.simulator import machine as machine_module
from neo_plan.simulator.figures import figures
from neo_plan.simulator.machine import Machine, SweepTime
from neo_plan.simulator.profile import PROFILES, Curve, Profile, read_profile
from neo_plan.simulator.run import Trace, simulate
from tests.support.fake_model import limits
from tests.support.mutants import mutated

# -- against the machine ---------------------------------------------------------------------

CASE_A = "--gpu-kv-blocks 1650"
CASE_C = "--gpu-kv-blocks 27806 --max-running-requests 512 --requests 600"


def simulated(options: str, workload: str) -> dict[str, Any]:
    return command.run(command.parser().parse_args(options.split()), workload)


@pytest.mark.parametrize(
    ("options", "workload", "measured"),
    [
        (CASE_A, "1000x50", 28.2),
        (CASE_A, "1000x100", 19.6),
        (CASE_A, "1000x200", 11.74),
        (CASE_A, "1000x400", 5.89),
        (CASE_C, "1000x200", 24.0),
    ],
)
def test_throughput_is_within_a_tenth_of_what_was_measured(
    options: str, workload: str, measured: float
) -> None:
    """docs/perf-log.md, GPU execution."""
    found = simulated(options, workload)
    assert found["requests_per_second"] == pytest.approx(measured, rel=0.1)
    assert found["gpu_idle_share"] < 0.001, "the device waits for Python"


def blocks(tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.arange(-(-tokens // 16), dtype=np.int32)


def plan(
    decode: int = 0,
    context: int = 0,
    chunk: int = 0,
    behind: int = 0,
    host: int = 0,
) -> IterationPlan:
    """Decode rows on both tiers with `context` tokens each, and a chunk behind `behind` tokens."""
    rows = [DecodeRow(i, 0, context, blocks(context)) for i in range(decode + host)]
    chunks: tuple[PrefillRow, ...] = ()
    if chunk:
        where = blocks(behind + chunk)
        chunks = (PrefillRow(999, Tier.GPU, behind, (0,) * chunk, where, True),)
    batch = SubBatch(chunks, tuple(rows[:decode]), tuple(rows[decode:]))
    return IterationPlan(1, Mode.INLINE, (), (batch,))


def make(module: ModuleType = machine_module, options: str = CASE_A) -> Machine:
    made = command.node_of(command.parser().parse_args(options.split())).machine()
    int8 = "int8" in options
    found: Machine = module.Machine(made.profile, made.spec, made.spec, made.table, int8)
    return found


def check_measured_sweeps(machine: Machine) -> None:
    """docs/perf-log.md, GPU execution and GPU kernels."""
    decode = machine.sweep(plan(24, 1100), ())
    assert decode.total == pytest.approx(7.56, rel=0.02)
    mixed = machine.sweep(plan(24, 1100, chunk=232, behind=768), ())
    assert mixed.total == pytest.approx(11.8, rel=0.03)
    # Each of 1,000 queries meets 7,000 more keys.
    behind = machine.sweep(plan(chunk=1000, behind=7000), ()).total
    operations = 4 * 32 * 32 * 128 * 7e6
    alone = machine.sweep(plan(chunk=1000), ()).total
    assert behind - alone == pytest.approx(1e3 * operations / 272e12)


def test_sweeps_take_what_was_measured() -> None:
    check_measured_sweeps(make())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ self._decode_ms(batch) +", "+"),
        (" + self._prefill_ms(batch.prefill)", ""),
        (" + self._head_ms(shape.sequences)", ""),
        ("self._dense * gpu.dense_ms.at(rows) + ", ""),
        ("+ self._small * gpu.small_ms.at(rows)", ""),
        ("1e-6 * context * self._kv_bytes", "1e-6 * context * self._kv_bytes / 2"),
        ("tokens * start + ", ""),
        ("gaps + self._dense_ms(shape.rows)", "gaps + self._dense_ms(shape.decode)"),
    ],
)
def test_mutants_of_the_machine_are_found(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_measured_sweeps(make(mutated(machine_module, old, new, tmp_path)))


def test_costs_at_start_are_those_of_the_sweeps() -> None:
    machine = make()
    costs = machine.start_costs()
    for rows in (5, 24, 100):
        fixed = machine.sweep(plan(rows, 1000), ()).total - costs.decode_ms(rows, 1000 * rows)
        assert fixed == pytest.approx(32 * 3.7e-3)  # a layer's attention that no token brings
    for rows in (64, 256, 512):
        chunk = machine.sweep(plan(chunk=rows), ()).total - costs.mixed_ms(rows, 0)
        assert 0 < chunk < 0.6, "attention within the chunk"
    assert costs.mixed_sizes[-1] == 8192


def test_other_models_cost_in_proportion() -> None:
    small, large = (
        command.node_of(
            command.parser().parse_args(f"--gpu-kv-blocks 9 --model {name}".split())
        ).machine()
        for name in ("llama3-8b", "llama3-70b")
    )
    ratio = large.sweep(plan(1, 16), ()).total / small.sweep(plan(1, 16), ()).total
    assert 8.5 < ratio < 9, "68.5 of 7.0 billion parameters; norms and head grow less"


# -- the host tier ---------------------------------------------------------------------------


def test_host_rows_wait_for_memory_or_for_launches() -> None:
    machine = make()
    few, many = (machine.sweep(plan(24, 1000, host=rows), ()) for rows in (1, 40))
    assert few.mode == many.mode == "inline"
    assert few.total == pytest.approx(32 * 0.425 + 0.42, abs=0.05), "Python launches each layer"
    read_ms = 40 * 1000 * 131072 / (139e9 * 0.81) * 1e3
    assert many.cpu == pytest.approx(read_ms)
    assert many.total > many.cpu + 5, "dense layers come on top: inline hides nothing of them"
    assert many.gpu < 9


def test_int8_kv_takes_half_of_the_bytes() -> None:
    sixteen, eight = (
        make(options=f"{CASE_A} --host-kv-dtype {kind}").sweep(plan(host=30, context=1000), ()).cpu
        for kind in ("auto", "int8")
    )
    # A scale of four bytes to each 128 elements, and 0.745 of the bandwidth instead of 0.81.
    assert eight / sixteen == pytest.approx(0.5 * (1 + 4 / 128) * 0.81 / 0.745)


def check_deferred_sweeps(machine: Machine) -> None:
    """The prototype's sweeps of 24 x 1,100, with so many requests to a layer: 0.4 ms for the
    exchange, and bound by the CPU beyond five."""
    batch = plan(24, 1100).batches
    deferred = IterationPlan(1, Mode.DEFERRED, (), batch)
    alone = machine.sweep(plan(24, 1100), ()).total
    times = {rows: machine.sweep(deferred, [1100] * 33 * rows) for rows in (1, 4, 6, 8)}
    assert times[1].total - alone == pytest.approx(0.4, abs=0.1)
    assert times[4].total - alone == pytest.approx(0.4, abs=0.1)
    assert times[6].total == pytest.approx(8.1, rel=0.04)
    assert times[8].total == pytest.approx(10.2, rel=0.03)
    assert times[4].cpu == pytest.approx(times[8].cpu / 2)
    assert times[8].cpu == times[8].total > times[8].gpu


def test_deferred_sweeps_take_what_the_prototype_took() -> None:
    check_deferred_sweeps(make())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sum(under_way)) / (self.spec.layers + 1)", "sum(under_way))"),
        ("max(gpu, cpu, moved", "max(gpu, moved"),
        ("deferred_layer_us.value", "deferred_layer_us.value * 0"),
        ("1e-6 * context * self._host_kv_bytes", "1e-6 * context * self._host_kv_bytes / 2"),
    ],
)
def test_mutants_of_deferred_sweeps_are_found(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_deferred_sweeps(make(mutated(machine_module, old, new, tmp_path)))


def check_asymmetric_sweeps(machine: Machine) -> None:
    """Against inline ones: two passes over the weights, and the host hidden behind them."""

    def sweep(first: int, second: int, chunk: int = 0) -> SweepTime:
        kept, moved = plan(24, 1100, chunk, host=first), plan(host=second, context=1100)
        return machine.sweep(
            IterationPlan(1, Mode.ASYMMETRIC, (), (*kept.batches, *moved.batches)), ()
        )

    def inline(host: int, chunk: int = 0) -> SweepTime:
        return machine.sweep(plan(24, 1100, chunk, host=host), ())

    # 0.94 us a token: 8 rows take 8.3 ms, and the device 6.9 with its rows.
    few = sweep(0, 8)
    assert few.cpu == pytest.approx(inline(8).cpu)
    assert few.gpu - inline(8).gpu == pytest.approx(5.4, abs=0.6), "a second weight pass"
    # Behind 1,000 prompt tokens (24 ms), 16 rows are hidden, which inline mode waits for.
    chunk = 1000
    hidden, waited = sweep(0, 16, chunk), inline(16, chunk)
    assert hidden.cpu == pytest.approx(waited.cpu)
    assert hidden.total == pytest.approx(hidden.gpu)
    assert waited.total - hidden.total == pytest.approx(waited.cpu - 5.4, rel=0.35)
    # Eight rows more in sub-batch 0 wait for sub-batch 1's dense layers alone.
    both = sweep(8, 16, chunk)
    assert both.total - hidden.total == pytest.approx(0.5 * hidden.cpu - 5.4, abs=1.8)


def test_asymmetric_sweeps_hide_the_host() -> None:
    check_asymmetric_sweeps(make())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max(dense + gpu, cpu_1 + exchange_1)", "dense + gpu + cpu_1 + exchange_1"),
        ("max(behind, cpu + exchange)", "behind"),
        ("gpu + behind", "gpu"),
        ("return busy, cpu + cpu_1,", "return busy, cpu,"),
    ],
)
def test_mutants_of_asymmetric_sweeps_are_found(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_asymmetric_sweeps(make(mutated(machine_module, old, new, tmp_path)))


def test_a_deferred_row_takes_as_many_sweeps_as_there_are_cohorts() -> None:
    bounds = limits(offload="always", cohorts=3)
    trace = simulate(Metronome(10, 2), bounds, [Lengths(8, 5)], [0.0])
    modes = [s.time.mode for s in trace.sweeps]
    assert modes == ["inline"] + ["deferred"] * 3 * 4
    assert trace.host_tokens == 5
    # Nothing is decided ahead: the thread's 2 ms come on top of each sweep.
    assert np.diff(trace.lives[0].tokens) == pytest.approx([0.036] * 4)


def test_offload_policies() -> None:
    options = f"{CASE_A} --requests 40"
    never = simulated(f"{options} --host-kv-blocks 2000 --offload never", "300x20")
    alone = simulated(options, "300x20")
    for found in (never, alone):
        del found["seconds_to_simulate"]
    assert never == alone
    always = simulated(
        f"{options} --host-kv-blocks 2000 --offload always --offload-mode inline", "300x20"
    )
    assert always["host_tokens"] == 20 * 40 + sum(
        r.output - 20 for r in read_workload("300x20", 40)
    )
    assert always["cpu_idle_share"] < 0.95
    assert set(always["modes"]) == {"inline"}


# -- against arithmetic ----------------------------------------------------------------------


class Metronome:
    """Every sweep takes as long, and so does the engine's thread."""

    def __init__(self, sweep_ms: float, host_ms: float) -> None:
        self._sweep_ms, self._host_ms = sweep_ms, host_ms

    def sweep(self, plan: IterationPlan, under_way: Sequence[int]) -> SweepTime:
        host = plan.mode is Mode.DEFERRED or any(
            row.tier is Tier.HOST for batch in plan.batches for row in batch.prefill
        )
        mode = plan.mode.value if host else "gpu_only"
        return SweepTime(mode, self._sweep_ms, self._sweep_ms)

    def host_ms(self, plan: IterationPlan) -> float:
        return self._host_ms

    def start_costs(self) -> SweepCosts | None:
        return None

    def start_rates(self) -> HostRates | None:
        return None


def serve(machine: Metronome, count: int = 1, arrivals: list[float] | None = None) -> Trace:
    lengths = [Lengths(8, 5)] * count
    return simulate(machine, limits(host_blocks=0), lengths, arrivals or [0.0] * count)


def test_sweeps_follow_each_other_while_the_thread_is_faster() -> None:
    """1 ms before the first sweep, five of 10 ms, 1 ms after each result. A token is told once the
    next sweep has been launched and its own result taken in."""
    (life,) = (trace := serve(Metronome(10, 2))).lives
    assert [s.begin for s in trace.sweeps] == pytest.approx([0.001 + 0.01 * i for i in range(5)])
    assert life.tokens == pytest.approx([0.001 + 0.01 * i + 0.001 for i in range(1, 6)])
    found = figures(trace)
    assert found["gpu_idle_share"] == pytest.approx(0.002 / 0.052, abs=1e-4)
    assert found["ttft_seconds"]["p50"] == pytest.approx(0.012)
    assert found["tpot_ms"]["p99"] == pytest.approx(10)
    assert found["requests_per_second"] == pytest.approx(1 / 0.052, abs=1e-3)


def test_a_slow_thread_makes_the_device_wait() -> None:
    trace = serve(Metronome(10, 30))
    gaps = [b.begin - a.begin for a, b in zip(trace.sweeps[1:], trace.sweeps[2:], strict=False)]
    assert gaps == pytest.approx([0.03] * 3), "the thread's work is the period"
    assert figures(trace)["gpu_idle_share"] > 0.5


def test_arrivals_are_waited_for() -> None:
    trace = serve(Metronome(10, 2), 2, [1.0, 5.0])
    first, second = trace.lives
    assert first.tokens[0] == pytest.approx(1.012)
    assert second.tokens[0] == pytest.approx(5.012)
    assert figures(trace)["gpu_idle_share"] > 0.95


def test_middle_is_that_of_the_engine_benchmark() -> None:
    """Requests that end one after the other: the middle rate is one a lifetime."""
    arrivals = [0.1 * i for i in range(10)]
    found = figures(serve(Metronome(10, 2), 10, arrivals))
    assert found["middle_requests_per_second"] == pytest.approx(10)
    assert found["middle_decode_rows"] == pytest.approx(0.8), "four of five sweeps decode"


# -- metamorphic -----------------------------------------------------------------------------


def faster(profile: Profile) -> Profile:
    gpu = profile.gpu
    dense = {rows: ms / 2 for rows, ms in gpu.dense_ms.points.items()}
    half = Curve(dense, "twice as fast")
    replaced: Profile = msgspec.structs.replace(
        profile, gpu=msgspec.structs.replace(gpu, dense_ms=half)
    )
    return replaced


def test_a_faster_machine_serves_more_and_more_blocks_do_too(tmp_path: Path) -> None:
    path = tmp_path / "faster.json"
    path.write_bytes(msgspec.json.encode(faster(read_profile("h100-16c.json"))))
    options = "--requests 60 --gpu-kv-blocks"
    base = simulated(f"{options} 400", "500x50")["requests_per_second"]
    more = simulated(f"{options} 1600", "500x50")["requests_per_second"]
    quick = simulated(f"--profile {path} {options} 400", "500x50")["requests_per_second"]
    assert more > 1.3 * base
    assert 1.3 * base < quick < 2 * base


def test_a_queue_forms_beyond_the_highest_rate() -> None:
    options = f"{CASE_A} --requests 120 --arrivals poisson --rate"
    calm, crowded = (simulated(f"{options} {rate}", "1000x100") for rate in (5, 60))
    assert calm["requests_per_second"] == pytest.approx(5, rel=0.2)
    assert calm["ttft_seconds"]["p90"] < 0.15
    assert crowded["ttft_seconds"]["p90"] > 1
    assert calm["tpot_ms"]["p50"] < crowded["tpot_ms"]["p50"]


def test_a_run_repeats() -> None:
    one, two = (simulated(f"{CASE_A} --requests 30 --seed 4", "200x30") for _ in "ab")
    assert {**one, "seconds_to_simulate": 0} == {**two, "seconds_to_simulate": 0}


def test_poisson_arrivals() -> None:
    times = poisson(4000, 8.0, 1)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(500, rel=0.05)


# -- what people type ------------------------------------------------------------------------


def test_every_profile_can_be_read() -> None:
    for path in PROFILES.glob("*.json"):
        read_profile(path.name)


def spoiled(change: Callable[[dict[str, Any]], object], folder: Path) -> str:
    raw = json.loads((PROFILES / "h100-16c.json").read_text())
    change(raw)
    path = folder / "spoiled.json"
    path.write_text(json.dumps(raw))
    return str(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda raw: raw.pop("link"), "link"),
        (lambda raw: raw["cpu"].update(cores=4), "cores"),
        (lambda raw: raw["gpu"]["gaps_ms"].pop("source"), "source"),
        (lambda raw: raw["gpu"]["head_ms"].update(points={"9": 1, "1": 2}), "ascending"),
    ],
)
def test_what_is_wrong_with_a_profile(
    change: Callable[[dict[str, Any]], object], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        read_profile(spoiled(change, tmp_path))


def test_a_curve_between_and_beyond_its_points() -> None:
    curve = Curve({2: 10.0, 4: 20.0, 8: 28.0}, "made up")
    assert [curve.at(x) for x in (1, 2, 3, 4, 6, 8, 10)] == [10, 10, 15, 20, 24, 28, 32]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--profile nowhere.json", "nowhere.json"),
        ("--workload 9000x9", "9"),
        ("--arrivals poisson --rate 0", "rate"),
        ("--requests 0", "requests"),
        ("--workload nonsense", "nonsense"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    options: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main([*CASE_A.split(), *options.split()])
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_one_line_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    options = f"{CASE_A} --requests 5 --workload 50x5 --workload 60x4 --json {path}"
    command.main(options.split())
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["llama3-8b 50x5", "llama3-8b 60x4"]
    assert json.loads(path.read_text())["figures"]["50x5"]["requests"] == 5
