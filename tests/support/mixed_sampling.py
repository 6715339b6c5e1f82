"""Requests that want all kinds of draws, for one batch, and answers compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import pytest

from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Submit, TokenLogprob
from gpu_service.scheduling.plan import Tier
from tests.support.engine import Answers, greedy, step

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "seed": 2**63 + 11},
    "filtered": {"temperature": 1.3, "seed": 5, "top_p": 0.8, "top_k": 12, "min_p": 0.02},
    "penalised": {
        "temperature": 0.8, "seed": 3, "repetition_penalty": 1.4, "presence_penalty": 0.3
    },
    "listed": {"logprobs": 3, "prompt_logprobs": 2, "frequency_penalty": 0.9},
    "biased": {"logit_bias": {17: 30.0, 2: 31.0}, "min_tokens": 3, "ignore_eos": False},
    "several": {"n": 2, "temperature": 1.0, "top_p": 0.9, "seed": 4, "frequency_penalty": 0.5},
}  # fmt: skip


def requests(names: Collection[str], output: int, prompt_tokens: int = 5) -> list[Submit]:
    """One of each, with prompts of different lengths."""
    prompts = {
        name: [3 + (7 * i + 13 * n) % 250 for i in range(prompt_tokens + 4 * n)]
        for n, name in enumerate(names)
    }
    return [greedy(name, prompts[name], output, **SAMPLINGS[name]) for name in names]


@dataclasses.dataclass
class Run:
    answers: Answers
    looked_ahead: int
    """How often an iteration was decided while tokens were pending."""
    preempted: int


def run_mixed(core: EngineCore, asked: list[Submit], *, preempt_every: int = 0) -> Run:
    """Until nothing is live. `preempt_every`: that many iterations, one choice on the GPU after the
    other loses its KV, whether its token is pending or not."""
    run, state = Run(Answers(), 0, 0), core.scheduler.state
    schedule = core.scheduler.schedule

    def counting(now: float) -> Any:
        run.looked_ahead += any(choice.pending for choice in state.running)
        if preempt_every and core.scheduler.iterations % preempt_every == preempt_every - 1:
            victims = [c for c in state.running if c.tier is Tier.GPU and not c.is_ending]
            if victims:
                state.preempt(victims[core.scheduler.iterations % len(victims)])
                run.preempted += 1
        return schedule(now)

    core.scheduler.schedule = counting  # type: ignore[method-assign]
    for request in asked:
        core.handle(request)
    for _ in range(5000):
        if not core.scheduler.live_requests:
            break
        step(core, run.answers)
    assert not core.scheduler.live_requests, "requests starve"
    return run


def assert_same(ours: Answers, theirs: Answers, *, tolerance: float = 1e-4) -> None:
    assert ours.tokens == theirs.tokens
    assert ours.finishes == theirs.finishes
    assert ours.refusals == theirs.refusals == {}
    for key, listed in theirs.logprobs.items():
        assert_same_logprobs(ours.logprobs[key], listed, tolerance)
    assert ours.prompts.keys() == theirs.prompts.keys()
    for name, prompt in theirs.prompts.items():
        assert_same_logprobs(ours.prompts[name].logprobs, prompt.logprobs, tolerance)


def assert_same_logprobs(
    ours: list[TokenLogprob], theirs: list[TokenLogprob], tolerance: float
) -> None:
    assert [x.token_id for x in ours] == [x.token_id for x in theirs]
    assert [x.rank for x in ours] == [x.rank for x in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        ours_values, values = ([x.logprob, *(v for _, v in x.top)] for x in (one, other))
        assert ours_values == pytest.approx(values, abs=tolerance)
