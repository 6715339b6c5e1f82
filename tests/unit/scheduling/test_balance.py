"""The split of host rows over two sub-batches, against all splits there are."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gpu_service.scheduling import balance
from gpu_service.scheduling.plan import DecodeRow, PrefillRow, SubBatch, Tier
from tests.support.mutants import mutated


@dataclass(frozen=True)
class Machine:
    """A `LayerCosts`: a weight pass and a little for each row; attention by its tokens."""

    weights_ms: float
    row_ms: float
    gpu_token_ms: float
    host_token_ms: float

    def linear_ms(self, rows: int) -> float:
        assert rows >= 1
        return self.weights_ms + self.row_ms * rows

    def gpu_attention_ms(self, batch: SubBatch) -> float:
        return self.gpu_token_ms * sum(row.length for row in batch.gpu_decode)

    def host_attention_ms(self, tokens: int) -> float:
        return self.host_token_ms * tokens


SMALL_GPU = Machine(0.1, 0.02, 1e-4, 1e-3)
LARGE_GPU = Machine(0.2, 0.002, 5e-5, 1e-3)
FAST_HOST = Machine(0.4, 0.01, 1e-4, 1.5e-4)
SLOW_HOST = Machine(0.1, 0.01, 1e-4, 1e-1)
COSTS = (SMALL_GPU, LARGE_GPU, FAST_HOST, SLOW_HOST)


def row(key: int, length: int) -> DecodeRow:
    return DecodeRow(key, 5, length, np.arange(1 + length // 16, dtype=np.int32))


def batch_of(host: list[int], gpu: list[int] | None = None, chunk: int = 0) -> SubBatch:
    """Rows by the tokens that they attend to."""
    table = np.arange(64, dtype=np.int32)
    return SubBatch(
        prefill=(PrefillRow(1000, Tier.GPU, 0, (5,) * chunk, table, True),) if chunk else (),
        gpu_decode=tuple(row(500 + i, length) for i, length in enumerate(gpu or [])),
        host_decode=tuple(row(i, length) for i, length in enumerate(host)),
    )


def random_batch(seed: int) -> SubBatch:
    draw = random.Random(seed)
    host = [draw.randint(1, 2000) for _ in range(draw.randint(1, 6))]
    gpu = [draw.randint(1, 2000) for _ in range(draw.choice((0, 0, 3, 30)))]
    return batch_of(host, gpu, draw.choice((0, 0, 10, 100)))


def tokens(batch: SubBatch) -> int:
    return sum(row.length for row in batch.host_decode)


def layer_ms(batches: tuple[SubBatch, ...], costs: Machine) -> float:
    """As design section 4 has it; one sub-batch: inline."""
    first = batches[0]
    if len(batches) == 1:
        attention = max(costs.gpu_attention_ms(first), costs.host_attention_ms(tokens(first)))
        return costs.linear_ms(first.tokens) + attention
    second = batches[1]
    device = costs.linear_ms(max(1, first.tokens)) + costs.gpu_attention_ms(first)
    ahead = max(device, costs.host_attention_ms(tokens(second)))
    return ahead + max(costs.linear_ms(second.tokens), costs.host_attention_ms(tokens(first)))


def all_splits(batch: SubBatch) -> list[tuple[SubBatch, ...]]:
    found: list[tuple[SubBatch, ...]] = [(batch,)]
    rows = batch.host_decode
    for choice in itertools.product((0, 1), repeat=len(rows)):
        kept, moved = (
            tuple(r for r, lane in zip(rows, choice, strict=True) if lane == i) for i in (0, 1)
        )
        first = SubBatch(batch.prefill, batch.gpu_decode, kept)
        if moved and first.tokens:
            found.append((first, SubBatch(host_decode=moved)))
    return found


def check_whole(batch: SubBatch, parts: tuple[SubBatch, ...]) -> None:
    """Nobody is lost, doubled or out of place; rows keep their order."""
    assert all(part.tokens for part in parts)
    assert parts[0].prefill == batch.prefill
    assert parts[0].gpu_decode == batch.gpu_decode
    assert all(not part.prefill and not part.gpu_decode for part in parts[1:])
    place = [row.key for part in parts for row in part.host_decode]
    assert sorted(place) == [row.key for row in batch.host_decode]
    for part in parts:
        keys = [row.key for row in part.host_decode]
        assert keys == sorted(keys)


Split = Callable[..., tuple[SubBatch, ...]]


def check_balance(split: Split) -> None:
    """Without costs: as many tokens for the one as for the other, within the longest row."""
    for seed in range(60):
        batch = random_batch(seed)
        parts = split(batch)
        check_whole(batch, parts)
        count, others = len(batch.host_decode), batch.tokens - len(batch.host_decode)
        assert len(parts) == 1 + (count > 0 and count + others > 1)
        if len(parts) == 2:
            larger = max(map(tokens, parts))
            best = min(max(map(tokens, found)) for found in all_splits(batch)[1:])
            assert larger <= 7 / 6 * best, "worse than longest-first can be"


def check_costs(split: Split) -> None:
    for seed in range(40):
        batch = random_batch(seed)
        for costs in COSTS:
            parts = split(batch, costs)
            check_whole(batch, parts)
            best = min(layer_ms(found, costs) for found in all_splits(batch))
            assert layer_ms(parts, costs) <= 1.03 * best


def test_without_costs_the_host_reads_as_much_for_the_one_as_for_the_other() -> None:
    check_balance(balance.split)


def test_with_costs_it_is_nearly_the_best_of_all_splits() -> None:
    check_costs(balance.split)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max(first.tokens, second.tokens)", "max(first.rows, second.rows)"),
        ("0 if times[0] < times[1] else 1", "1 if times[0] < times[1] else 0"),
        ("-row.length", "row.length"),
    ],
)
def test_mutants_of_the_balance_are_found(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_balance(mutated(balance, old, new, tmp_path).split)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("costs.host_attention_ms(second.tokens)", "costs.host_attention_ms(first.tokens)"),
        ("return max(device, host) + behind", "return device + host + behind"),
        ("return max(device, host) + behind", "return max(device, host)"),
        ("_inline_ms(batch, costs) <= time()", "False"),
        ("_inline_ms(batch, costs) <= time()", "True"),
        (" + attention\n", "\n"),
    ],
)
def test_mutants_of_the_costs_are_found(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_costs(mutated(balance, old, new, tmp_path).split)


def test_what_can_be_hidden_is_hidden() -> None:
    """Prompts beside make room behind sub-batch 0; a compute-bound device some behind 1, too."""
    batch = batch_of([300] * 8, [500] * 10, chunk=400)
    parts = balance.split(batch, SMALL_GPU)
    assert len(parts) == 2
    first, second = parts
    device = SMALL_GPU.linear_ms(first.tokens) + SMALL_GPU.gpu_attention_ms(first)
    assert SMALL_GPU.host_attention_ms(tokens(second)) <= device
    assert SMALL_GPU.host_attention_ms(tokens(first)) <= SMALL_GPU.linear_ms(second.tokens)


def test_a_second_pass_over_the_weights_has_to_pay() -> None:
    """Little for the host to do, and a device that waits for its weights."""
    batch = batch_of([20, 20], [500] * 10)
    assert balance.split(batch, LARGE_GPU) == (batch,)
    assert len(balance.split(batch)) == 2


def test_a_batch_without_host_rows_stays_as_it_is() -> None:
    for batch in (batch_of([], [10, 20]), batch_of([], chunk=5), batch_of([400])):
        assert balance.split(batch) == (batch,)
        assert balance.split(batch, SMALL_GPU) == (batch,)
