"""What a CUDA sweep's sampler is told, and how what it finds is read."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gpu_service.engine.messages import SamplingSpec, TokenLogprob
from gpu_service.model.adjust import SamplingRow
from gpu_service.model.sampling_limits import MOST_EDITS, MOST_LISTED, draws_on_device
from gpu_service.pipeline.cuda.history import HistorySlots
from gpu_service.pipeline.cuda.logprobs import LandingLogprobs, SweepLogprobs
from gpu_service.pipeline.cuda.sampling import Draw, row_wish
from kernels.gpu.sampling import Logprobs
from kernels.gpu.sampling_inputs import NEVER, RowWish


def spec(**changes: Any) -> SamplingSpec:
    return SamplingSpec(**{"temperature": 0.0, "max_tokens": 9, **changes})


def draw(position: int = 4, choice: int = 0, **changes: Any) -> Draw:
    return Draw(0, SamplingRow(spec(**changes), [1, 2], [], choice), position, 0)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"logprobs": MOST_LISTED, "prompt_logprobs": MOST_LISTED}, True),
        ({"logprobs": MOST_LISTED + 1}, False),
        ({"prompt_logprobs": MOST_LISTED + 1}, False),
        ({"logit_bias": dict.fromkeys(range(MOST_EDITS), 1.0)}, True),
        ({"logit_bias": dict.fromkeys(range(MOST_EDITS), 1.0), "stop_token_ids": (1,)}, False),
        ({"temperature": 1.0, "frequency_penalty": 1.0, "top_k": 5, "min_tokens": 3}, True),
    ],
)
def test_what_the_device_draws(changes: dict[str, Any], fits: bool) -> None:
    assert draws_on_device(spec(**changes)) == fits


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.1},
        {"frequency_penalty": 0.1},
        {"logprobs": 0},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 5},
    ],
)
def test_rows_that_want_more_than_the_largest_logit(changes: dict[str, Any]) -> None:
    assert not draw(**changes).is_greedy


def test_rows_that_want_the_largest_logit_only() -> None:
    """Filters and seeds change nothing where nothing is drawn, nor does a minimum that is met."""
    assert draw(min_tokens=4, top_k=3, top_p=0.1, min_p=0.5, seed=7, prompt_logprobs=2).is_greedy


def test_a_wish_has_all_that_is_asked_for() -> None:
    asked = draw(
        position=2, choice=3, temperature=0.5, top_k=4, top_p=0.6, min_p=0.1, seed=40,
        repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.3,
        logit_bias={5: 1.5, 8: 9.0}, min_tokens=3, stop_token_ids=(7,), logprobs=6,
    )  # fmt: skip
    assert row_wish(asked, 12, (8, 9)) == RowWish(
        temperature=0.5, top_k=4, top_p=0.6, min_p=0.1, seed=43, position=2,
        edits={5: 1.5, 7: NEVER, 8: NEVER, 9: NEVER}, history=12,
        repetition=1.1, frequency=0.2, presence=0.3, logprobs=6,
    )  # fmt: skip


def test_a_wish_of_a_plain_row_is_the_default() -> None:
    assert row_wish(draw(position=0, min_tokens=0), -1, (8, 9)) == RowWish()


@pytest.mark.parametrize("seed", range(5))
def test_slots_are_filled_exactly_where_they_missed_a_draw(seed: int) -> None:
    """Against a record of what each slot has been told; choices come, repeat, pause and go."""
    pick, slots = random.Random(seed), HistorySlots(4)
    running: dict[int, int] = {}  # choice -> next position
    told: dict[int, tuple[int, int]] = {}  # slot -> whose draws it knows, and up to which
    fills = 0
    for step in range(600):
        if len(running) < 4 and pick.random() < 0.4:
            running[step] = pick.choice([0, 0, 7])
        if running and pick.random() < 0.1:
            del running[pick.choice(list(running))]
        if pick.random() < 0.03:  # others draw, and some positions pass by
            slots.forget()
            told.clear()
            running = {key: position + 1 for key, position in running.items()}
        used = set()
        for key in [key for key in running if pick.random() < 0.7]:
            position = running[key]
            slot, is_new = slots.take(key, position, running)
            assert 0 <= slot < 4
            assert slot not in used
            used.add(slot)
            known = told.get(slot) in ((key, position - 1), (key, position))
            assert is_new == (not known)
            fills += is_new
            told[slot] = key, position
            running[key] += pick.random() < 0.8  # otherwise it is repeated
    assert 20 < fills < 400


def test_logprobs_are_read_by_choice() -> None:
    found = Logprobs(
        torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        torch.tensor([1, 2, 3, 4], dtype=torch.int32),
        torch.tensor([[5, 6]] * 4, dtype=torch.int32),
        torch.tensor([[-0.5, -1.5]] * 4),
    )
    landing = LandingLogprobs.send([40, 41, 42, 43], [0, -1, 2, 1], found)
    found.rank.fill_(99)  # the next sweep's
    prompt = LandingLogprobs.send([44, 44, 44, 44], [1] * 4, found)
    logprobs = SweepLogprobs({39: None}, landing, [((8, 9, 7, 6), prompt)])
    tokens = {39: 1, 40: 2, 41: 3, 42: 4, 43: -1}
    assert logprobs.of_tokens(tokens) == {
        39: None,
        40: TokenLogprob(2, -1.0, 1, []),
        42: TokenLogprob(4, -3.0, 3, [(5, -0.5), (6, -1.5)]),
    }
    (listed,) = logprobs.of_prompts().values()
    assert [(x.token_id, x.rank, x.top) for x in listed] == [
        (token, 99, [(5, -0.5)]) for token in (8, 9, 7, 6)
    ]
