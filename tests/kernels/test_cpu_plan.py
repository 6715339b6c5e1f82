"""How the CPU attention's work is cut: enough items for all threads, few where there is plenty."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernels.cpu import DType

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Plan:
    items: int
    ranges: int
    partials: int
    chunks: list[tuple[int, int, int]]
    """Row, and the tokens from and to."""
    parts: dict[int, tuple[int, int]]
    """Of each row: tokens of one, and how many."""


Cut = Callable[..., Plan]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Cut:
    sources = ROOT / "kernels/cpu/csrc"
    program = tmp_path_factory.mktemp("plan") / "plan"
    subprocess.run(
        ["g++", "-std=c++20", "-Wall", "-fsanitize=undefined", "-fno-sanitize-recover",
         f"-I{sources}", Path(__file__).with_name("attention_plan_print.cpp"),
         sources / "attention_plan.cpp", sources / "kv_pool.cpp", "-o", program],
        check=True,
    )  # fmt: skip

    def run(
        lengths: Sequence[int], threads: int, kv_heads: int = 8, dim: int = 128, window: int = 0
    ) -> Plan:
        numbers = (kv_heads, dim, int(DType.BFLOAT16), threads, window, *lengths)
        done = subprocess.run(
            [program, *map(str, numbers)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        first, *rest = ([int(x) for x in line.split()] for line in done.stdout.splitlines())
        chunks = [(row, begin, end) for row, begin, end, _, _ in rest]
        return Plan(*first, chunks, {row: (part, parts) for row, _, _, part, parts in rest})

    return run


SMALL = {"5 x 1,100": ([1100] * 5, 8), "3 x 400, 32 heads": ([400] * 3, 32), "10": ([1100] * 10, 8)}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_batch_leaves_every_thread_many_items(cut: Cut, name: str) -> None:
    lengths, heads = SMALL[name]
    assert cut(lengths, 14, heads).items >= 8 * 14


def test_one_row_is_shared(cut: Cut) -> None:
    assert cut([1100], 14).items >= 2 * 14
    assert cut([4000], 14).items >= 2 * 14


def test_one_of_128k_tokens_has_bounded_partial_results(cut: Cut) -> None:
    plan = cut([131072], 14)
    assert plan.items >= 16 * 14
    assert plan.partials <= 64


@pytest.mark.parametrize("threads", [2, 14])
def test_rows_of_a_large_batch_are_whole(cut: Cut, threads: int) -> None:
    plan = cut([1100] * 64, threads)
    assert plan.chunks == [(row, 0, 1100) for row in range(64)]
    assert plan.partials == 0
    long = cut([8000] * 64, threads)
    assert all(end - begin >= 1024 for _, begin, end in long.chunks)


def test_parts_depend_on_the_row_alone(cut: Cut) -> None:
    lengths = [1, 64, 256, 257, 1100, 4000, 9000, 70000]
    together = cut(lengths * 8, 1).parts
    for row, length in enumerate(lengths):
        assert cut([length], 32, kv_heads=1).parts[0] == together[row]


@pytest.mark.parametrize("window", [0, 1777])
def test_every_token_is_in_one_chunk(cut: Cut, window: int) -> None:
    lengths = [1, 63, 64, 65, 255, 256, 257, 511, 1025, 2048, 2049, 5000, 16385, 65537, 131072]
    for threads in (1, 3, 64):
        plan = cut(lengths, threads, window=window)
        for row, length in enumerate(lengths):
            own = [(begin, end) for of, begin, end in plan.chunks if of == row]
            start = max(0, length - window) // 64 * 64 if window else 0
            assert [begin for begin, _ in own] == [start, *(end for _, end in own[:-1])]
            assert own[-1][1] == length
            part, parts = plan.parts[row]
            assert parts == -(-(length - start) // part) <= 64
            assert all((begin - start) % part == 0 < end - begin for begin, end in own)
