"""`neo plan`: against what was measured, and its search against arithmetic."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_client import cli
from neo_client.prices import MachinePrice, read_prices
from neo_client.workloads import Lengths, read_workload
from neo_client.workloads.traces import Traced
from neo_plan import datasheet, search
from neo_plan.command import EXAMPLE
from neo_plan.demand import Demand, busiest, demand_of, thinned
from neo_plan.node import Node, Sizes, gpu_blocks, make_node, read_model, weights_gib, with_cores
from neo_plan.search import FULL_SHARE, Goal, Kind, Search, with_spares
from neo_plan.simulator.figures import figures
from neo_plan.simulator.profile import PROFILES, read_profile
from neo_plan.simulator.run import Trace, simulate
from neo_plan.trial import Trial, capacity, run

H100 = read_profile("h100-16c.json")
LLAMA3 = read_model("llama3-8b")

# -- against the machine ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "running", "workload", "requests", "measured"),
    [
        pytest.param(1650, 256, "1000x50", 300, 28.2, marks=pytest.mark.slow),
        pytest.param(1650, 256, "1000x100", 300, 19.6, marks=pytest.mark.slow),
        (1650, 256, "1000x200", 300, 11.74),
        pytest.param(1650, 256, "1000x400", 300, 5.89, marks=pytest.mark.slow),
        (0, 512, "1000x200", 600, 24.0),
    ],
)
def test_capacity_is_within_a_tenth_of_what_was_measured(
    blocks: int, running: int, workload: str, requests: int, measured: float
) -> None:
    """docs/perf-log.md, GPU execution: cases A, with a small pool, and C, with the whole card,
    whose pool is what this package finds that it has."""
    sizes = Sizes(max_running_requests=running)
    node = make_node(H100, LLAMA3, cores=16, host_gib=128, offload=False, sizes=sizes)
    node = replace(node, gpu_blocks=blocks or node.gpu_blocks)
    found = capacity(node, read_workload(workload, requests, 0))
    assert found == pytest.approx(measured, rel=0.1)


H200 = read_profile("h200.json")


def h200(offload: bool, **sizes: Any) -> Node:
    """As measured: `--gpu-kv-blocks 1650`, and 21 GiB of host KV."""
    node = make_node(
        H200, LLAMA3, cores=16, host_gib=128, offload=offload,
        sizes=Sizes(max_running_requests=192, **sizes),
    )  # fmt: skip
    blocks = (21 << 30) // (LLAMA3.kv_bytes_per_token(2) * 16)
    return replace(node, gpu_blocks=1650, host_blocks=blocks if offload else 0)


def test_a_datasheet_against_a_machine_that_it_knew_nothing_of() -> None:
    """docs/perf-log.md, Deferred attention on a GPU: one H200."""
    found = figures(simulated(h200(False), 250))
    assert found["requests_per_second"] == pytest.approx(13.78, rel=0.1)


@pytest.mark.slow
def test_offloading_on_that_machine() -> None:
    """In deferred mode, as measured."""
    node = h200(True, max_batch_tokens=192, offload_mode="deferred")
    found = figures(simulated(node, 1500))
    assert found["requests_per_second"] == pytest.approx(15.13, rel=0.1)


def simulated(node: Node, requests: int) -> Trace:
    lengths = read_workload("1000x200", requests, 0)
    return simulate(node.machine(), node.limits(), lengths, [0.0] * requests)


def test_the_pool_of_the_measured_machine() -> None:
    """27,806 blocks (docs/perf-log.md), and 67.7 GiB of fp8 weights for 70B: half of 16 bits."""
    found = gpu_blocks(H100.gpu.memory_gib.value, LLAMA3, Sizes(max_running_requests=512))
    assert found == pytest.approx(27_806, rel=0.02)
    llama70 = read_model("llama3-70b")
    tables = 2 * 2 * llama70.vocab_size * llama70.hidden_size / 2**30
    assert (weights_gib(llama70) - tables) / 2 + tables == pytest.approx(67.7, rel=0.02)


# -- profiles from datasheets ----------------------------------------------------------------


def test_profiles_are_what_their_datasheets_give() -> None:
    for name, text in datasheet.files().items():
        assert (PROFILES / name).read_bytes() == text, "run python -m neo_plan.datasheet"


def test_the_measured_machine_from_its_own_datasheet() -> None:
    """The rule that makes the others, where the answer is known."""
    made = datasheet.derive(datasheet.MEASURED, H100).gpu
    for rows, ms in H100.gpu.dense_ms.points.items():
        assert made.dense_ms.at(rows) == pytest.approx(ms, rel=0.08)
    assert made.decode_attention_gbps.value == H100.gpu.decode_attention_gbps.value
    assert made.head_ms == msgspec.structs.replace(H100.gpu.head_ms, source=made.head_ms.source)


def test_every_derived_figure_says_that_it_is_not_measured() -> None:
    for card in datasheet.CARDS:
        profile = read_profile(f"{card.name}.json")
        assert "not measured" in profile.about
        for part in (profile.gpu, profile.cpu, profile.link):
            for name in part.__struct_fields__:
                assert "not measured" in getattr(part, name).source, f"{card.name} {name}"


def test_cards_are_in_order() -> None:
    """A decode sweep is as quick as memory is, a large prompt as arithmetic."""
    profiles = {card: read_profile(f"{card.name}.json").gpu for card in datasheet.CARDS}
    for one, a in profiles.items():
        for two, b in profiles.items():
            if one.memory_gbps >= two.memory_gbps and one.tflops >= two.tflops:
                assert all(a.dense_ms.at(n) <= b.dense_ms.at(n) for n in a.dense_ms.points)


def test_threads_read_an_equal_share_up_to_what_was_measured() -> None:
    assert with_cores(H100, 16) == with_cores(H100, 64) == H100
    half = with_cores(H100, 9).cpu.read_gbps
    assert half.value == pytest.approx(139 / 2)
    assert "7 threads" in half.source
    assert with_cores(H100, 1).cpu.read_gbps.value == pytest.approx(139 / 14)


# -- demand ----------------------------------------------------------------------------------

TRACE = tuple(Traced(0.1 * n, Lengths(10 + n % 3, 2)) for n in range(1000))


@given(st.integers(1, 50), st.integers(1, 400))
@settings(max_examples=60)
def test_replicas_share_a_trace_out(replicas: int, requests: int) -> None:
    part = Demand(10.0, "t", TRACE).part(replicas, requests)
    assert len(part.lengths) == len(part.arrivals) == min(requests, 1000 // replicas)
    assert part.arrivals[0] == 0
    assert part.arrivals == sorted(part.arrivals)
    if len(part.arrivals) > 2:
        assert part.rate == pytest.approx(10 / replicas, rel=0.1)


def test_the_busiest_stretch_is_the_shortest() -> None:
    rows = [Traced(at, Lengths(1, 1)) for at in (0, 10, 11, 12, 20, 30)]
    assert [row.at for row in busiest(rows, 3)] == [10, 11, 12]
    assert [row.at for row in thinned(rows, 2)] == [0, 11, 20]


def test_a_rate_speeds_a_trace_up_and_what_is_too_long_is_left_out() -> None:
    demand, left_out = demand_of(20.0, "1x1", "azure_conv_2023", 0, 4096)
    assert left_out == sum(
        row.lengths.prompt + row.lengths.output > 4096 for row in
        demand_of(None, "1x1", "azure_conv_2023", 0, 10**6)[0].trace
    )  # fmt: skip
    part = demand.part(1, 10_000)
    assert part.rate == pytest.approx(20, rel=0.01)
    assert demand.longest <= 4096
    for rate, trace, problem in ((None, None, "rate"), (0.0, None, "rate"), (1.0, "no", "trace")):
        with pytest.raises(ValueError, match=problem):
            demand_of(rate, "1000x200", trace, 0, 8192)
    with pytest.raises(ValueError, match="context"):
        demand_of(1.0, "9000x10", None, 0, 8192)


# -- search, on made-up machines -------------------------------------------------------------


def trial(share: float) -> Trial:
    latencies = {name: {"p50": 1.0, "p95": 2.0, "p99": 3.0} for name in ("ttft", "tpot", "e2e")}
    return Trial(share, "" if share == 1 else "ttft", 1, 1, 0, 0.5, 0, 10, 5, 0, latencies)


def kind(name: str, price: float, blocks: int = 1000, gbps: float = 1000, host: int = 0) -> Kind:
    """Of a card that differs by its `gbps`."""
    gpu = msgspec.structs.replace(
        H100.gpu, decode_attention_gbps=msgspec.structs.replace(
            H100.gpu.decode_attention_gbps, value=gbps
        ),
    )  # fmt: skip
    profile = msgspec.structs.replace(H100, gpu=gpu)
    node = Node(profile, LLAMA3, LLAMA3, Sizes(), blocks, host)
    return Kind(name, MachinePrice(1, 8, 32, price), node)


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Machines that hold their targets up to so many requests a second (by `gbps`), and never more
    than twice that."""
    calls: dict[str, float] = {"trials": 0}

    def holds(node: Node, part: Any, targets: Any) -> Trial:
        calls["trials"] += 1
        most = node.profile.gpu.decode_attention_gbps.value / 100
        return trial(1.0 if part.rate <= most * 1.0001 else 0.5)

    monkeypatch.setattr(search, "run", holds)
    monkeypatch.setattr(
        search, "capacity",
        lambda node, _: 2 * node.profile.gpu.decode_attention_gbps.value / 100,
    )  # fmt: skip
    return calls


STEADY = tuple(Traced(0.001 * n, Lengths(100, 10)) for n in range(60_000))


@given(st.floats(100, 5000), st.floats(0.5, 8), st.floats(100, 5000), st.floats(0.5, 8))
@settings(max_examples=15, deadline=None)
def test_the_answer_is_the_cheapest_number_that_holds(
    a: float, price_a: float, b: float, price_b: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            search, "run",
            lambda node, part, _: trial(
                1.0 if part.rate <= node.profile.gpu.decode_attention_gbps.value / 99 else 0.5
            ),
        )  # fmt: skip
        patch.setattr(
            search, "capacity",
            lambda node, _: node.profile.gpu.decode_attention_gbps.value / 50,
        )  # fmt: skip
        demand = Demand(1000.0, "steady", STEADY)
        kinds = [kind("a", price_a, gbps=a), kind("b", price_b, gbps=b)]
        found = Search(demand, Goal({"ttft": 1})).run(kinds)
    costs = {
        name: price * math.ceil(1000 / (gbps / 99))
        for name, gbps, price in (("a", a, price_a), ("b", b, price_b))
    }
    best = found[0]
    assert best.per_hour <= min(costs.values()) * 1.06
    assert best.per_hour >= min(costs.values()) * 0.94
    assert best.reason == ""
    assert all(each.reason for each in found[1:])


def test_reasons(arithmetic: dict[str, float]) -> None:
    demand = Demand(100.0, "steady", STEADY, scale=0.1)
    kinds = [
        kind("good", 1.0, gbps=1000),
        kind("dear", 2.0, gbps=1000),
        kind("slow", 0.2, gbps=100),
        kind("tiny", 0.1, gbps=900, blocks=0),
        kind("small", 0.1, gbps=800, blocks=2),
        kind("gold", 100.0, gbps=700),
    ]
    found = {each.kind.name: each for each in Search(demand, Goal({"ttft": 1})).run(kinds)}
    assert found["good"].replicas == 10
    assert found["good"].reason == ""
    assert "as quick as good" in found["dear"].reason
    assert found["slow"].replicas == 100
    assert "100% dearer; one less misses ttft 1 ms (p95 2, 50%" in found["slow"].reason
    assert "does not fit" in found["tiny"].reason
    assert "holds requests of 32 tokens, and some have 110" in found["small"].reason
    assert "asks for 100 an hour" in found["gold"].reason


def test_a_replica_is_never_asked_for_all_that_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that grows slowly would pass any short trial."""
    monkeypatch.setattr(search, "run", lambda *_: trial(1.0))
    monkeypatch.setattr(search, "capacity", lambda *_: 10.0)
    demand = Demand(1000.0, "steady", STEADY)
    answer = Search(demand, Goal({"ttft": 1})).run([kind("a", 1.0)])[0]
    assert answer.replicas == math.ceil(1000 / (FULL_SHARE * 10))
    assert Search(demand, Goal({"ttft": 1})).most(answer)[0] <= FULL_SHARE * 10 * 1.001


def test_spares_count_in_what_is_cheapest(arithmetic: dict[str, float]) -> None:
    """One large machine would do, and three of them are dearer than three smaller ones."""
    demand = Demand(10.0, "steady", STEADY, scale=0.01)
    kinds = [kind("large", 3.5, gbps=1000), kind("small", 2.5, gbps=500)]
    for zones, name, total in ((1, "large", 1), (3, "small", 3)):
        best = Search(demand, Goal({"ttft": 1}, zones=zones)).run(kinds)[0]
        assert (best.kind.name, best.total) == (name, total)


def test_no_machine_is_quick_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "run", lambda *_: trial(0.2))
    monkeypatch.setattr(search, "capacity", lambda *_: 10.0)
    found = Search(Demand(1.0, "s", STEADY), Goal({"ttft": 1})).run([kind("a", 1.0)])
    assert found[0].replicas == 0
    assert "on an idle machine" in found[0].reason


@given(st.integers(1, 500), st.integers(2, 8))
def test_spares_are_enough_and_not_a_zone_more(replicas: int, zones: int) -> None:
    total = with_spares(replicas, zones)
    assert total % zones == 0
    left = total - total // zones
    assert left >= replicas
    assert left - (zones - 1) < replicas
    assert with_spares(replicas, 1) == replicas


# -- the whole -------------------------------------------------------------------------------


def test_more_load_is_worse() -> None:
    """On a pool of four requests."""
    node = make_node(H100, LLAMA3, cores=16, host_gib=64, offload=False, sizes=Sizes())
    node = replace(node, gpu_blocks=300)
    calm, crowded = (
        run(node, Demand(rate, "1000x30").part(1, 40), {"ttft": 1000}) for rate in (1.0, 60.0)
    )
    assert calm.share == 1
    assert crowded.share < 1
    assert crowded.missed == "ttft"
    assert crowded.in_system > calm.in_system
    assert crowded.gpu_busy > calm.gpu_busy
    assert calm.host_share == crowded.host_share == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    words = ["plan", "--rate", "8", "--workload", "200x20", "--requests", "40", "--machine",
             "h100-16c", "--machine", "t4-8c", "--zones", "3", "--json", str(path)]  # fmt: skip
    assert cli.main([*words, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "3 x h100-16c" in out
    assert "made up" in out
    found = json.loads(path.read_text())
    first = found["kinds"][0]
    assert (first["machine"], first["offload"], first["replicas"]) == ("h100-16c", False, 3)
    assert found["advice"]["replicas"] == 3
    assert all(k["reason"] for k in found["kinds"][1:])
    assert cli.main([*words, "--quiet", "--target", "ttft=0.001"]) == 1
    assert "no kind of machine" in capsys.readouterr().err
    for wrong in (["--share", "2"], ["--machine", "none"], ["--zones", "0"], ["--model", "/none"]):
        assert cli.main([*words, "--quiet", *wrong]) == 2, wrong


def test_the_example_says_that_its_prices_are_made_up() -> None:
    prices = read_prices(str(EXAMPLE))
    assert "made up" in prices.note
    for name, machine in prices.machines.items():
        assert (PROFILES / f"{machine.gpu}.json").exists(), name
