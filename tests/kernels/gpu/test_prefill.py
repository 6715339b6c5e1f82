"""Prefill attention against fp64, and the kernels that lay a sweep's inputs out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.prefill_attention import PrefillAttention
from kernels.gpu.sweep_inputs import embed, expand_tables
from kernels.gpu.tensors import INTERPRET
from tests.support.gpu_cases import BOUND, error

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


CASES = {
    "llama": PrefillCase(8, 2, 128, 16, ((0, 5), (70, 33), (0, 0), (16, 1))),
    "smollm2": PrefillCase(9, 3, 64, 16, ((3, 40), (0, 64))),
    "mha-odd-dim": PrefillCase(2, 2, 80, 32, ((31, 66), (0, 1))),
    "group-7": PrefillCase(7, 1, 96, 64, ((130, 9),)),
    "group-16": PrefillCase(16, 1, 64, 16, ((60, 70),)),
    "wide": PrefillCase(4, 2, 256, 16, ((20, 40),)),
    "window": PrefillCase(4, 2, 64, 16, ((150, 40), (0, 70), (5, 3)), window=20),
    "softcap": PrefillCase(4, 2, 64, 16, ((33, 5),), softcap=5.0),
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

    def run(self, out: torch.Tensor) -> None:
        case = self.case
        attention = PrefillAttention(self.layout, case.query_heads)
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
    q = torch.randn((rows, case.query_heads, case.head_dim), generator=draw).to(dtype)
    lengths = torch.tensor([sum(chunk) for chunk in case.chunks], dtype=torch.int32)
    ends = torch.tensor([own for _, own in case.chunks]).cumsum(0)
    first_rows = torch.cat((torch.zeros(1), ends)).to(torch.int32)
    moved = (x.to(DEVICE) for x in (q, cache.to(dtype), tables, lengths, first_rows))
    return PrefillInputs(case, layout, *moved, keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_prefill_attention(name: str, dtype: torch.dtype) -> None:
    inputs = prefill_inputs(CASES[name], dtype)
    guarded = torch.full((inputs.q.shape[0] + 2, *inputs.q.shape[1:]), 7.0, dtype=dtype)
    guarded = guarded.to(DEVICE)
    inputs.run(guarded[1:-1])
    truth = inputs.oracle(torch.float64)
    torch_error = error(inputs.oracle(dtype), truth)
    assert error(guarded[1:-1], truth) <= BOUND * torch_error + 1e-6
    assert (guarded[0] == 7).all()
    assert (guarded[-1] == 7).all()


@pytest.mark.parametrize(
    "mutant", ["context off by one", "a block exchanged", "window off by one", "chunks exchanged"]
)
def test_the_bound_finds_mistakes(mutant: str) -> None:
    inputs = prefill_inputs(CASES["window"], torch.float32)
    truth = inputs.oracle(torch.float64)
    allowed = BOUND * error(inputs.oracle(torch.float32), truth) + 1e-6
    if mutant == "context off by one":
        inputs.lengths[0] -= 1
    elif mutant == "a block exchanged":
        inputs.tables[0, 10] = inputs.tables[1, 0]
    elif mutant == "window off by one":
        inputs.case = PrefillCase(4, 2, 64, 16, inputs.case.chunks, window=21)
    else:
        inputs.first_rows[1] += 1
    out = torch.zeros_like(inputs.q)
    inputs.run(out)
    assert error(out, truth) > 10 * allowed


def test_wrong_arguments_are_refused() -> None:
    inputs = prefill_inputs(CASES["softcap"], torch.float32)
    with pytest.raises(ValueError, match="first_rows"):
        inputs.first_rows = inputs.first_rows[:-1]
        inputs.run(torch.zeros_like(inputs.q))
    with pytest.raises(ValueError, match="query_heads"):
        PrefillAttention(inputs.layout, 5)


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
