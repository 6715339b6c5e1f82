"""What an engine says about how fast it works off what requests wait for."""

from __future__ import annotations

import pytest

from gpu_service.engine.statistics import RATE_SECONDS, LoadRates, Rate
from gpu_service.kv.table import BlockTable
from gpu_service.scheduling.plan import IterationPlan, Mode, PrefillRow, SubBatch, Tier


def plan(tokens: int) -> IterationPlan:
    row = PrefillRow(
        key=0, tier=Tier.GPU, start=0, token_ids=(1,) * tokens, blocks=BlockTable([0]).view(),
        samples=False,
    )  # fmt: skip
    batches = (SubBatch(prefill=(row,)),) if tokens else ()
    return IterationPlan(1, Mode.INLINE, (), batches)


def test_a_rate_is_the_mean_and_forgets() -> None:
    rate = Rate()
    assert rate.per_second == 0
    for _ in range(100):
        rate.observe(10, 0.1)
    assert rate.per_second == pytest.approx(100)
    for _ in range(round(5 * RATE_SECONDS)):
        rate.observe(500, 1.0)
    assert rate.per_second == pytest.approx(500, rel=0.02)


def test_prompts_count_in_iterations_with_prompts_and_kv_in_all() -> None:
    rates = LoadRates()
    given_back = dict.fromkeys(Tier, 0)
    for n in range(10):
        rates.observe(plan(100 if n % 2 else 0), given_back, 0.5)
        given_back[Tier.GPU] += 50
    rates.observe(plan(0), given_back, 0.5)
    assert rates.prompt_tokens_per_second == pytest.approx(200)
    assert rates.freed_tokens_per_second(Tier.GPU) == pytest.approx(100, rel=0.2)
    assert rates.freed_tokens_per_second(Tier.HOST) == 0


def test_short_prompts_do_not_make_an_engine_look_slow() -> None:
    rates, given_back = LoadRates(), dict.fromkeys(Tier, 0)
    rates.observe(plan(1000), given_back, 0.05)
    for _ in range(20):
        rates.observe(plan(5), given_back, 0.01)
    assert rates.prompt_tokens_per_second > 15_000
