"""From samples to figures, conditions and comparisons."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_client.bench.compare import compare, differences
from neo_client.bench.figures import distribution, figures, flat, meets, names
from neo_client.bench.sample import Sample
from neo_client.bench.thresholds import failures, parse
from neo_client.prices import Fleet, fleet_of, read_prices
from protos.neo.v1 import types_pb2 as types
from tests.support.bench import result_of_samples


def sample(
    number: int = 0, due: float = 0.0, sent: float = 0.0, first: float = 0.1, gap: float = 0.05,
    tokens: int = 5, **fields: Any,
) -> Sample:  # fmt: skip
    made = Sample(number, 0, due, sent, 10, tokens, **fields)
    for at in range(tokens):
        made.take(1, first + at * gap)
    made.end = first + (tokens - 1) * gap + 0.001
    return made


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=300))
def test_percentiles_are_samples_that_so_many_do_not_exceed(values: list[float]) -> None:
    found = distribution(values)
    ordered = sorted(round(1e3 * value, 4) for value in values)
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[name] in ordered
        below = sum(value <= found[name] for value in ordered)
        assert below >= share * len(ordered) - 1e-9
        assert sum(value < found[name] for value in ordered) < share * len(ordered) + 1e-9
    assert (found["min"], found["max"]) == (ordered[0], ordered[-1])


def test_latencies_count_from_the_intended_time() -> None:
    found = figures([sample(due=1.0, sent=3.0, first=3.5, gap=0.1, tokens=3)], {})
    ms = {name: ends.get("p50") for name, ends in found["latencies_ms"].items()}
    assert ms["ttft"] == 2500
    assert ms["sent_ttft"] == 500
    assert ms["delay"] == 2000
    assert ms["tpot"] == ms["itl"] == 100
    assert ms["e2e"] == pytest.approx(2701)


def test_warm_up_and_failures_are_left_out_and_failures_counted() -> None:
    samples = [
        sample(0, first=50.0, warmup=True),
        sample(1, first=0.2),
        sample(2, first=9.0, code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL"),
        sample(3, first=9.0, code="UNAVAILABLE"),
    ]
    found = figures(samples, {})
    assert found["latencies_ms"]["ttft"]["max"] == 200
    assert found["failures"] == {"RESOURCE_EXHAUSTED QUEUE_FULL": 1, "UNAVAILABLE": 1}
    assert found["rates"]["requests"] == 3
    assert found["rates"]["failed"] == 2
    assert found["rates"]["output_tokens"] == 5


def test_tokens_by_tier_and_from_the_cache() -> None:
    used = sample(tokens=4)
    used.usage = types.Usage(gpu_tokens=1, host_tokens=3, cached_prompt_tokens=5)
    rates = figures([used], {})["rates"]
    assert (rates["host_token_share"], rates["cached_prompt_share"]) == (0.75, 0.5)


def test_goodput_counts_what_meets_every_target() -> None:
    samples = [
        sample(0, first=0.1, gap=0.01),
        sample(1, first=0.9, gap=0.01),
        sample(2, first=0.1, gap=0.30),
        sample(3, first=0.1, gap=0.01, code="UNAVAILABLE"),
    ]
    goodput = figures(samples, {"ttft": 500, "tpot": 100})["goodput"]
    assert goodput["goodput_share"] == 0.25
    assert meets(sample(tokens=1), {"tpot": 0.001})
    uneven = sample(tokens=3)
    uneven.take(1, 5.0)
    assert not meets(uneven, {"itl": 1000})
    assert meets(uneven, {"itl": 10_000})


def test_an_empty_run_has_figures_without_latencies() -> None:
    found = figures([], {"ttft": 1})
    assert found["rates"]["requests_per_second"] == 0
    assert found["latencies_ms"]["ttft"] == {}
    assert found["goodput"]["goodput_share"] == 0


def test_every_figure_has_a_known_name() -> None:
    result = result_of_samples(
        [sample()], targets={"ttft": 1}, fleet=Fleet("f", gpus=1, cores=2, per_hour=3)
    )
    values = flat(result)
    assert set(values) <= names()
    for name in ("ttft_p99.9_ms", "itl_mean_ms", "goodput_share", "tokens_per_usd",
                 "tokens_per_gpu_second", "client_core_share"):  # fmt: skip
        assert name in values


# -- conditions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "fails"),
    [
        ("ttft_p99_ms>500", 501, True),
        ("ttft_p99_ms>500", 500, False),
        ("ttft_p99_ms >= 500", 500, True),
        ("goodput_share<0.95", 0.94, True),
        ("goodput_share<=1e-3", 0.5, False),
        ("failed>0", None, True),
    ],
)
def test_conditions(text: str, value: float | None, fails: bool) -> None:
    threshold = parse(text)
    assert bool(failures([threshold], {} if value is None else {threshold.name: value})) is fails


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ttft_p99_ms", "must be like"),
        ("ttft_p98_ms>1", "did you mean .*ttft_p9"),
        ("ttft_p99_ms>+10%", "neo bench compare"),
        ("ttft_p99_ms>+10", "sign and %"),
        ("ttft_p99_ms>1.2.3", "not a number"),
    ],
)
def test_conditions_that_cannot_be(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse(text)


def test_changes_against_another_run() -> None:
    more = parse("ttft_p99_ms>+10%", relative=True)
    assert not failures([more], {"ttft_p99_ms": 110}, {"ttft_p99_ms": 100.1})
    assert failures([more], {"ttft_p99_ms": 111}, {"ttft_p99_ms": 100})
    less = parse("requests_per_second<-5%", relative=True)
    assert failures([less], {"requests_per_second": 94}, {"requests_per_second": 100})
    assert failures([less], {"requests_per_second": 94}, {})
    with pytest.raises(ValueError, match="sign and %"):
        parse("ttft_p99_ms>10%", relative=True)


# -- comparisons -----------------------------------------------------------------------------


def run(seed: int, factor: float = 1.0, count: int = 400) -> dict[str, Any]:
    draw = random.Random(seed)
    return result_of_samples(
        [sample(i, first=factor * draw.lognormvariate(-2, 0.5)) for i in range(count)]
    )


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    return {change.name: change.verdict for change in compare(before, after)}


def test_what_is_slower_is_worse_and_what_is_drawn_anew_unclear() -> None:
    slower = verdicts(run(1), run(2, 1.5))
    assert slower["ttft_mean_ms"] == slower["ttft_p50_ms"] == slower["ttft_p90_ms"] == "worse"
    quicker = verdicts(run(1, 1.5), run(2))
    assert quicker["ttft_p50_ms"] == "better"
    assert verdicts(run(1), run(1))["ttft_p50_ms"] == "unclear"


def test_intervals_cover_what_chance_does() -> None:
    """A 95% interval of no change must hold 0 in about 95 of 100 pairs of runs."""
    held = sum(
        verdicts(run(2 * i, count=200), run(2 * i + 1, count=200))["ttft_p90_ms"] == "unclear"
        for i in range(50)
    )
    assert held >= 42


def test_a_percentile_of_few_samples_has_no_interval() -> None:
    found = {change.name: change for change in compare(run(1, count=60), run(2, count=60))}
    assert found["ttft_p50_ms"].interval is not None
    assert found["ttft_p99_ms"].interval is None
    assert found["ttft_p99_ms"].verdict == ""


def test_what_makes_runs_hard_to_compare_is_said() -> None:
    one, two = run(1), run(2)
    two["options"]["rate"] = 5.0
    assert differences(one, two) == ["option rate: None and 5.0"]


# -- prices ----------------------------------------------------------------------------------


def test_tokens_for_what_the_fleet_took(tmp_path: Any) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(
        "currency: EUR\nmachines:\n"
        "  big: {gpus: 2, cores: 16, host_gib: 64, per_hour: 7.2}\n"
        "  none: {gpus: 0, cores: 4, host_gib: 8, per_hour: 0}\n"
    )
    prices = read_prices(str(path))
    assert fleet_of(prices, {"big": 2}).efficiency(4000, 10) == {
        "tokens_per_gpu_second": 100, "tokens_per_core_second": 12.5, "tokens_per_usd": 100_000,
    }  # fmt: skip
    assert fleet_of(prices, {"none": 1}).efficiency(40, 1) == {"tokens_per_core_second": 10}
    assert Fleet().efficiency(10, 1) == Fleet(gpus=1).efficiency(10, 0) == {}
    with pytest.raises(ValueError, match="big, none"):
        fleet_of(prices, {"small": 1})
    for bad in ("machines: 3", "machines: {a: {gpus: 1}}", "- a", "a: [", "machines: {a: {gpus: 1, "
                "cores: 0, host_gib: 1, per_hour: 1}}"):  # fmt: skip
        path.write_text(bad)
        with pytest.raises(ValueError, match="prices"):
            read_prices(str(path))
