"""CPU decode attention against the float64 oracle: every instruction set, thread count and type."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import cpu
from kernels.cpu import DType, ThreadPool
from tests.support.cpu_attention import Case, Sequences, check, each_isa

F32, BF16, F16, INT8 = DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16, DType.INT8
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (INT8, BF16), (INT8, F32), (BF16, F32), (F32, BF16)]
EDGES = (1, 15, 16, 17, 63, 64, 65, 130)
CASES = {
    "groups of 2": Case(EDGES),
    "9 of 3 heads": Case(EDGES, 9, 3, 64, 16),
    "one head each, blocks of 32": Case((31, 32, 33, 100), 4, 4, 128, 32),
    "groups of 8, blocks of 64": Case((63, 64, 65, 200), 16, 2, 128, 64),
    "groups of 5, 16 dims": Case((7, 50), 5, 1, 16, 16),
    "groups of 16, 80 dims": Case((1, 40), 16, 1, 80, 16),
    "256 dims": Case((3, 70), 3, 1, 256, 16),
    "window": Case((5, 40, 41, 100, 200), 4, 2, 64, 16, window=40),
    "softcap": Case((20, 90), 4, 2, 64, 16, softcap=20.0, spread=4.0),
    "large scores": Case((20, 90, 300), 4, 2, 64, 16, spread=30.0),
    "several chunks": Case((2100, 1025, 1024), 4, 2, 64, 16),
    "several chunks, window": Case((2400, 1900), 4, 2, 64, 32, window=1777),
}


@pytest.fixture(params=each_isa())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NEO_CPU_ISA", request.param)
    assert cpu.isa() == request.param
    return str(request.param)


@pytest.mark.parametrize(("kv", "activation"), PAIRS, ids=lambda d: d.name.lower())
@pytest.mark.parametrize("name", CASES)
def test_every_set_agrees_with_the_oracle(
    isa: str, name: str, kv: DType, activation: DType
) -> None:
    sequences = Sequences(replace(CASES[name], kv=kv, activation=activation))
    with ThreadPool(2) as threads:
        check(sequences, *sequences.attend(threads))


@pytest.mark.parametrize(
    ("kv", "group", "isa"),
    [(BF16, 3, "avx512bf16"), (BF16, 4, "amx"), (INT8, 7, "avx512bf16"), (INT8, 8, "amx")],
)
def test_tiles_are_used_where_they_were_faster(
    monkeypatch: pytest.MonkeyPatch, kv: DType, group: int, isa: str
) -> None:
    if isa not in cpu.isas():
        pytest.skip(f"needs a CPU with {isa}")
    monkeypatch.delenv("NEO_CPU_ISA", raising=False)
    assert cpu.loop_isa(kv, BF16, group) == isa
    assert cpu.loop_isa(F16, F16, group) == "avx512", "no other set has a loop for it"
    monkeypatch.setenv("NEO_CPU_ISA", cpu.isas()[-1])
    assert cpu.loop_isa(kv, BF16, group) == cpu.isas()[-1]


def test_results_do_not_depend_on_threads(isa: str) -> None:
    sequences = Sequences(Case((3000, 1100, 90), 8, 4, 64, kv=BF16, activation=BF16))
    with ThreadPool(1) as threads:
        out, lse = sequences.attend(threads)
    for count in (2, 3, 5):
        with ThreadPool(count, spin_us=0) as threads:
            for _ in range(3):
                again, lse_again = sequences.attend(threads)
                assert torch.equal(out, again)
                assert np.array_equal(lse, lse_again)


def test_a_row_does_not_depend_on_the_rest_of_the_batch() -> None:
    sequences = Sequences(Case((2300, 40, 1100), kv=BF16, activation=BF16))
    with ThreadPool(2) as threads:
        out, _ = sequences.attend(threads)
        for row in range(3):
            one = slice(row, row + 1)
            alone = torch.empty_like(sequences.q[one])
            cpu.decode_attention(
                threads, sequences.pool, 1, sequences.q[one].contiguous(), None, None,
                sequences.tables[one], sequences.lengths[one], alone, scale=64**-0.5,
            )  # fmt: skip
            assert torch.equal(alone, out[one])


def test_a_row_does_not_depend_on_how_it_is_cut(isa: str) -> None:
    """Whole in a large batch of one thread; part by part alone with eight, in any order."""
    sequences = Sequences(Case((1100,) * 10 + (2300, 700), 4, 2, 64, kv=BF16, activation=BF16))
    with ThreadPool(1) as one, ThreadPool(8, spin_us=0) as eight:
        out, _ = sequences.attend(one)
        for row in (0, 10, 11):
            own = slice(row, row + 1)
            alone = torch.empty_like(sequences.q[own])
            for _ in range(3):
                cpu.decode_attention(
                    eight, sequences.pool, 1, sequences.q[own], None, None,
                    sequences.tables[own], sequences.lengths[own], alone, scale=64**-0.5,
                )  # fmt: skip
                assert torch.equal(alone, out[own])


def test_appending_twice_changes_nothing() -> None:
    sequences = Sequences(Case((17, 64), kv=INT8, activation=BF16))
    with ThreadPool(1) as threads:
        first, _ = sequences.attend(threads)
        memory = sequences.memory.copy()
        second, _ = sequences.attend(threads)
    assert torch.equal(first, second)
    assert np.array_equal(memory, sequences.memory)


def test_two_pools_at_once() -> None:
    cases = [Sequences(Case((1900, 33), kv=kv, activation=F32)) for kv in (F32, INT8)]

    def many(sequences: Sequences) -> None:
        with ThreadPool(2) as threads:
            for _ in range(20):
                check(sequences, *sequences.attend(threads))

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(many, cases))


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("kv", [F32, BF16, INT8], ids=lambda d: d.name.lower())
def test_nan_shows(isa: str, where: str, kv: DType) -> None:
    sequences = Sequences(Case((40,), kv=kv, activation=BF16))
    target = {"q": sequences.q, "k": sequences.k_new, "v": sequences.v_new}[where]
    target[0, 0, 3] = float("nan")
    with ThreadPool(1) as threads:
        out, lse = sequences.attend(threads)
    assert out[0, 0].isnan().any()
    assert np.isnan(lse[0, 0]) or where == "v"
    assert not out[0, -1].isnan().any(), "heads of other groups are untouched"


MUTANTS = {
    "the tail is not masked": lambda s: {"lengths": s.lengths + 1},
    "the last token is dropped": lambda s: {"lengths": s.lengths - 1},
    "wrong scale": lambda s: {"scale": 63**-0.5},
    "block table off by one": lambda s: {
        "block_tables": np.ascontiguousarray(s.tables[:, [1, 0, 2]])
    },
    "window off by one": lambda s: {"window": s.case.window + 1},
    "no window": lambda s: {"window": 0},
    "no softcap": lambda s: {"softcap": 0.0},
    "heads of groups interleaved": lambda s: {
        "q": s.q.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2).contiguous()
    },
    "q of the next row": lambda s: {"q": s.q.roll(1, 0).contiguous()},
    "K of the new token in V": lambda s: {"v_new": s.k_new},
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("kv", [F32, BF16, INT8], ids=lambda d: d.name.lower())
def test_the_comparison_fails_for_mutants(name: str, kv: DType) -> None:
    activation = F32 if kv is F32 else BF16
    case = Case(
        (30, 45, 38), 4, 2, 64, 16, kv, activation, window=28, softcap=3.0, spread=3.0, seed=1
    )
    right = Sequences(case)
    wrong = Sequences(case)
    with ThreadPool(1) as threads:
        check(right, *right.attend(threads))
        changes = MUTANTS[name](wrong)
        out, lse = wrong.attend(threads, **changes)
    with pytest.raises(AssertionError):
        check(right, out, lse)


@pytest.mark.parametrize("broken", ["nan", "inf", "one element", "lse"])
def test_the_comparison_fails_for_broken_results(broken: str) -> None:
    sequences = Sequences(Case((30,), kv=BF16, activation=BF16))
    with ThreadPool(1) as threads:
        out, lse = sequences.attend(threads)
    if broken == "lse":
        lse[0, 1] += 0.01
    else:
        worse = {"nan": float("nan"), "inf": float("inf"), "one element": float(out[0, 0, 0]) + 0.1}
        out[0, 0, 0] = worse[broken]
    with pytest.raises(AssertionError):
        check(sequences, out, lse)
