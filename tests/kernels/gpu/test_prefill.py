"""Prefill attention against fp64, and the kernels that lay a sweep's inputs out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernels.gpu import prefill_attention
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.prefill_attention import PrefillAttention, Tiling
from kernels.gpu.sweep_inputs import embed, expand_tables
from kernels.gpu.tensors import INTERPRET
from tests.support.gpu_cases import BOUND, error
from tests.support.mutants import mutated

DEVICE = "cpu" if INTERPRET else "cuda"


@dataclass(frozen=True)
class PrefillCase:
    """chunks: (earlier tokens, own tokens) of each; (0, 0) is padding."""

    query_heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    chunks: tuple[tuple[int, int], ...]
    window: int = 0
    softcap: float = 0.0
    magnitude: float = 1.0


CASES = {
    "llama": PrefillCase(8, 2, 128, 16, ((0, 5), (70, 33), (0, 0), (16, 1))),
    "smollm2": PrefillCase(9, 3, 64, 16, ((3, 40), (0, 64))),
    "mha-odd-dim": PrefillCase(2, 2, 80, 32, ((31, 66), (0, 1))),
    "group-7": PrefillCase(7, 1, 96, 64, ((130, 9),)),
    "group-16": PrefillCase(16, 1, 64, 16, ((60, 70),)),
    "wide": PrefillCase(4, 2, 256, 16, ((20, 40),)),
    "window": PrefillCase(4, 2, 64, 16, ((150, 40), (0, 70), (5, 3)), window=20),
    "softcap": PrefillCase(4, 2, 64, 16, ((33, 5),), softcap=5.0),
    "large-scores": PrefillCase(4, 2, 64, 16, ((77, 5), (3, 30)), magnitude=100.0),
    "many-chunks": PrefillCase(3, 1, 16, 16, tuple((7 * i % 40, 5 * i % 23) for i in range(21))),
    "all-padding": PrefillCase(4, 2, 64, 16, ((0, 0), (0, 0))),
}


@dataclass
class PrefillInputs:
    case: PrefillCase
    layout: GpuKvLayout
    q: torch.Tensor
    cache: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    first_rows: torch.Tensor
    keys: list[tuple[torch.Tensor, torch.Tensor]]

    def run(
        self,
        out: torch.Tensor,
        make: Any = PrefillAttention,
        tiling: Any = None,
        splits: int | None = None,
    ) -> None:
        case = self.case
        attention = make(self.layout, case.query_heads, DEVICE)
        attention.tiling, attention.splits = tiling, splits
        attention(
            self.q, self.cache[0], self.tables, self.lengths, self.first_rows, out,
            longest=max(1, *(own for _, own in case.chunks)), scale=case.head_dim**-0.5,
            window=case.window, softcap=case.softcap,
        )  # fmt: skip

    def oracle(self, dtype: torch.dtype) -> torch.Tensor:
        case = self.case
        out = torch.zeros(self.q.shape, dtype=dtype, device=self.q.device)
        group, row = case.query_heads // case.kv_heads, 0
        for (context, own), (k, v) in zip(case.chunks, self.keys, strict=True):
            distance = torch.arange(context, context + own)[:, None] - torch.arange(context + own)
            seen = (distance >= 0) & ((distance < case.window) if case.window else True)
            keys, values = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("thd,chd->htc", self.q[row : row + own].to(dtype), keys)
            scores = scores * case.head_dim**-0.5
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            scores = scores.masked_fill(~seen.to(scores.device), float("-inf"))
            out[row : row + own] = torch.einsum("htc,chd->thd", scores.softmax(-1), values)
            row += own
        return out


def prefill_inputs(case: PrefillCase, dtype: torch.dtype, seed: int = 0) -> PrefillInputs:
    """Slots that no chunk owns are NaN, table entries past a chunk's end absurd."""
    draw = torch.Generator().manual_seed(seed)
    size = case.block_tokens
    needed = [-(-(context + own) // size) for context, own in case.chunks]
    blocks = sum(needed) + 3
    layout = GpuKvLayout(1, blocks, case.kv_heads, size, case.head_dim)
    cache = torch.full(layout.shape, float("nan"))
    order = torch.randperm(blocks, generator=draw).tolist()
    tables = torch.full((len(needed), max(needed) + 1), 2**30, dtype=torch.int32)
    keys = []
    for index, (context, own) in enumerate(case.chunks):
        mine = [order.pop() for _ in range(needed[index])]
        tables[index, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        shape = (2, context + own, case.kv_heads, case.head_dim)
        values = torch.randn(shape, generator=draw).to(dtype)
        for t in range(context + own):
            cache[0, mine[t // size], :, :, t % size] = values[:, t].float()
        keys.append((values[0].to(DEVICE), values[1].to(DEVICE)))
    rows = sum(own for _, own in case.chunks)
    q = torch.randn((rows, case.query_heads, case.head_dim), generator=draw)
    q = (q * case.magnitude).to(dtype)
    lengths = torch.tensor([sum(chunk) for chunk in case.chunks], dtype=torch.int32)
    ends = torch.tensor([own for _, own in case.chunks]).cumsum(0)
    first_rows = torch.cat((torch.zeros(1), ends)).to(torch.int32)
    moved = (x.to(DEVICE) for x in (q, cache.to(dtype), tables, lengths, first_rows))
    return PrefillInputs(case, layout, *moved, keys)


def check_prefill(inputs: PrefillInputs, **options: Any) -> None:
    """Error at most BOUND times torch's own, rows of no chunk untouched."""
    shape = (inputs.q.shape[0] + 2, *inputs.q.shape[1:])
    guarded = torch.full(shape, 7.0, dtype=inputs.q.dtype, device=DEVICE)
    inputs.run(guarded[1:-1], **options)
    truth = inputs.oracle(torch.float64)
    torch_error = error(inputs.oracle(inputs.q.dtype), truth)
    slack = 1e-5 if inputs.case.magnitude > 1 else 1e-6
    assert error(guarded[1:-1], truth) <= BOUND * torch_error + slack
    assert (guarded[0] == 7).all()
    assert (guarded[-1] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_prefill_attention(name: str, dtype: torch.dtype) -> None:
    check_prefill(prefill_inputs(CASES[name], dtype))


@pytest.mark.parametrize("rows", [16, 32, 128])
@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize("name", ["smollm2", "window"])
def test_the_tiling_changes_nothing(name: str, rows: int, tokens: int) -> None:
    check_prefill(prefill_inputs(CASES[name], torch.float32), tiling=Tiling(rows, tokens, 4, 2))


# Merging one row and head after the other is slow in the interpreter: few cases.
@pytest.mark.parametrize(
    ("name", "splits", "dtype"),
    [
        ("llama", 2, torch.bfloat16),
        ("llama", 3, torch.float32),
        ("llama", 8, torch.float32),
        ("window", 3, torch.float32),
        ("many-chunks", 2, torch.float32),
    ],
)
def test_splits_change_nothing(name: str, splits: int, dtype: torch.dtype) -> None:
    check_prefill(prefill_inputs(CASES[name], dtype), splits=splits)


def test_splits_follow_the_devices_size() -> None:
    layout = prefill_inputs(CASES["llama"], torch.float32).layout
    attention = PrefillAttention(layout, 8, DEVICE, multiprocessors=132)
    tiling = Tiling(64, 64, 4, 3)
    found = [attention._choose_splits(rows, tiling) for rows in (1, 100, 400, 2000, 9000)]
    assert found[0] == 8
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1


def test_rows_of_others_stay_as_they_are() -> None:
    inputs = prefill_inputs(CASES["llama"], torch.float32)
    truth = inputs.oracle(torch.float64)
    own = slice(3, 3 + inputs.q.shape[0])
    inputs.q = torch.nn.functional.pad(inputs.q, (0, 0, 0, 0, 3, 40), value=float("nan"))
    inputs.first_rows += 3
    out = torch.full_like(inputs.q, 7.0)
    inputs.run(out)
    assert error(out[own], truth) < 1e-6
    out[own] = 7
    assert (out == 7).all()


def test_blocks_past_the_window_are_not_looked_up() -> None:
    inputs = prefill_inputs(CASES["window"], torch.float32)
    truth = inputs.oracle(torch.float64)
    # The first row of chunk 0 stands at 150 and sees tokens from 131 on: blocks 0 to 7 are gone.
    inputs.cache[0, inputs.tables[0, :8].long()] = float("nan")
    inputs.tables[0, :8] = 2**30
    out = torch.zeros_like(inputs.q)
    inputs.run(out)
    assert error(out, truth) < 1e-6


def test_a_nan_in_use_is_not_hidden() -> None:
    inputs = prefill_inputs(CASES["smollm2"], torch.float32)
    inputs.cache[0, inputs.tables[0, 0], 0, 1, 2] = float("nan")
    out = torch.zeros_like(inputs.q)
    inputs.run(out)
    # Three query heads share the KV head that holds it.
    assert out[:40, 3:6].isnan().all()
    out[:40, 3:6] = 0
    assert out.isfinite().all()


# They must read within bounds: the interpreter works on plain pointers.
MUTANTS = {
    "sees the next token": ("at[None, :] <= positions", "at[None, :] <= 1 + positions", "llama"),
    "diagonal without a mask": (
        "seen = at[None, :] <= pos",
        "seen = at[None, :] >= 0 * pos",
        "llama",
    ),
    "window one too long": ("at[None, :] > positions", "at[None, :] >= positions", "window"),
    "window's edge without a mask": (
        "whole_begin = tl.cdiv(tl.maximum(end - window, 0), TOKENS) * TOKENS",
        "whole_begin = oldest // TOKENS * TOKENS",
        "window",
    ),
    "a tile too many seen whole": ("(first + 1) //", "end //", "llama"),
    "a tile left out": ("self._group) + chunks", "self._group) + chunks - 1", "llama"),
    "positions from 0": ("context = tl.load(lengths_ptr + chunk) - count", "context = 0", "llama"),
    "wrong query head": ("q_ptr + slot", "q_ptr + (slot ^ 1)", "llama"),
    "wrong block": ("at // BLOCK, mask", "at // BLOCK // 2, mask", "llama"),
    "values of another head": ("kv_heads * BLOCK * DIM", "BLOCK * DIM", "llama"),
    "the top forgotten": ("total * shrink +", "total +", "llama"),
    "no cap": ("softcap * (2.0", "0.0 * softcap + scores; (2.0", "softcap"),
    "a share twice": ("(begin + split * share)", "(begin + split // 2 * share)", "splits"),
    "a share cut short": ("(split + 1) * share)", "(split + 1) * share - 1)", "splits"),
    "parts weighed alike": ("top * scale_log2 + tl.log2(total)", "tl.log2(total)", "splits"),
    "wrong base of the exponential": ("scale * LOG2_E", "scale", "llama"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name: str, tmp_path: Path) -> None:
    old, new, case = MUTANTS[name]
    inputs = prefill_inputs(CASES["llama" if case == "splits" else case], torch.float32)
    make = mutated(prefill_attention, old, new, tmp_path).PrefillAttention
    with pytest.raises(AssertionError):
        check_prefill(inputs, make=make, splits=3 if case == "splits" else None)


@pytest.mark.parametrize("mutant", ["length", "table", "first row"])
def test_the_bound_finds_wrong_inputs(mutant: str) -> None:
    inputs = prefill_inputs(CASES["window"], torch.float32)
    truth = inputs.oracle(torch.float64)
    if mutant == "length":
        inputs.lengths[0] -= 1
    elif mutant == "table":
        inputs.tables[0, 10] = inputs.tables[1, 0]
    else:
        inputs.first_rows[1] += 1
    out = torch.zeros_like(inputs.q)
    inputs.run(out)
    assert error(out, truth) > 1e-3


def test_wrong_arguments_are_refused() -> None:
    inputs = prefill_inputs(CASES["softcap"], torch.float32)
    inputs.first_rows = inputs.first_rows[:-1]
    with pytest.raises(ValueError, match="first_rows"):
        inputs.run(torch.zeros_like(inputs.q))
    with pytest.raises(ValueError, match="query_heads"):
        PrefillAttention(inputs.layout, 5, DEVICE)


def test_expand_tables_writes_what_counts_say() -> None:
    blocks = torch.arange(100, 2100, dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([5, 0, 700], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([3, 0, 1200], dtype=torch.int32, device=DEVICE)
    tables = torch.full((4, 1500), -7, dtype=torch.int32, device=DEVICE)
    expand_tables(blocks, starts, counts, tables[:3])
    assert tables[0, :4].tolist() == [105, 106, 107, -7]
    assert (tables[1] == -7).all()
    assert torch.equal(tables[2, :1200], blocks[700:1900])
    assert (tables[2, 1200:] == -7).all()
    assert (tables[3] == -7).all()


def test_embed_takes_drawn_tokens_where_ids_are_unknown() -> None:
    table = torch.randn(11, 48, device=DEVICE)
    ids = torch.tensor([4, -1, -1, 10], device=DEVICE)
    sources = torch.tensor([-1, 2, 0, -1], dtype=torch.int32, device=DEVICE)
    drawn = torch.tensor([-1, 9, 7], device=DEVICE)
    out = torch.empty(4, 48, device=DEVICE)
    embed(ids, sources, drawn, table, out)
    assert torch.equal(out, table[[4, 7, 0, 10]])
