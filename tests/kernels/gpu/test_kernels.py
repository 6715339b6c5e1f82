"""The GPU kernels against fp64: on a CUDA device where there is one, else in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels.gpu import rope_store
from kernels.gpu.decode_attention import DecodeAttention
from kernels.gpu.tensors import INTERPRET
from tests.support.gpu_cases import (
    DecodeCase,
    DecodeInputs,
    check_add_rms_norm,
    check_decode,
    check_rope_store,
    check_silu_mul,
    decode_inputs,
)
from tests.support.mutants import mutated

DEVICE = "cpu" if INTERPRET else "cuda"
RAGGED = (1, 15, 16, 17, 0, 70)
CASES = {
    "llama": DecodeCase(8, 2, 128, 16, RAGGED),
    "smollm2": DecodeCase(9, 3, 64, 16, RAGGED),
    "mha-odd-dim": DecodeCase(2, 2, 80, 32, (1, 31, 33, 0)),
    "group-7": DecodeCase(7, 1, 96, 64, (65, 128)),
    "group-16": DecodeCase(16, 1, 64, 16, (130,), splits=5),
    "wide": DecodeCase(4, 2, 256, 16, (40, 3)),
    "window": DecodeCase(4, 2, 64, 16, (1, 19, 20, 21, 150), splits=3, window=20),
    "softcap": DecodeCase(4, 2, 64, 16, (33, 5), softcap=5.0),
    "large-scores": DecodeCase(4, 2, 64, 16, (77, 5), magnitude=100.0),
    "one-split": DecodeCase(4, 2, 64, 16, (77, 0), splits=1),
    "all-padding": DecodeCase(4, 2, 64, 16, (0, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_decode_attention(name: str, dtype: torch.dtype) -> None:
    check_decode(decode_inputs(replace(CASES[name], dtype=dtype), DEVICE))


def call(inputs: DecodeInputs, out: torch.Tensor) -> None:
    case = inputs.case
    attention = DecodeAttention(
        inputs.layout, case.query_heads, len(case.lengths), case.splits, DEVICE
    )
    attention(inputs.q, inputs.cache[0], inputs.tables, inputs.lengths, out, scale=1.0)


def test_a_second_launch_gives_the_same_bits() -> None:
    """Splits are merged in their order, whoever ended first."""
    inputs = decode_inputs(CASES["group-16"], DEVICE)
    attention = DecodeAttention(inputs.layout, 16, 1, 5, DEVICE)
    first, second = torch.zeros_like(inputs.q), torch.zeros_like(inputs.q)
    for out in (first, second):
        attention(inputs.q, inputs.cache[0], inputs.tables, inputs.lengths, out, scale=1.0)
    assert first.abs().sum() > 0
    assert torch.equal(first, second)


def test_a_nan_in_use_is_not_hidden() -> None:
    inputs = decode_inputs(CASES["smollm2"], DEVICE)
    inputs.cache[0, inputs.tables[3, 0], 0, 0, 0, 0] = float("nan")
    out = torch.zeros_like(inputs.q)
    call(inputs, out)
    # Three query heads share the KV head that holds it.
    assert out[3, :3].isnan().all()
    out[3, :3] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("rows", "width"), [(1, 48), (3, 576), (2, 4096)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_add_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    check_add_rms_norm(rows, width, dtype, DEVICE)


@pytest.mark.parametrize("width", [96, 1536, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    check_silu_mul(3, width, dtype, DEVICE)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("name", ["smollm2", "mha-odd-dim"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rope_store(name: str, normed: bool, dtype: torch.dtype) -> None:
    check_rope_store(replace(CASES[name], dtype=dtype), 5, normed=normed, device=DEVICE)


@pytest.mark.parametrize("tokens", [255, 256])
def test_rope_store_of_few_and_many_tokens(tokens: int) -> None:
    case = DecodeCase(3, 1, 16, 16, ())
    check_rope_store(case, tokens, normed=True, device=DEVICE)


ROPE_MUTANTS = {
    "values rotated": ("head >= QUERY_HEADS + KV_HEADS", "head >= QUERY_HEADS + KV_HEADS + 1"),
    "last key as it is": ("head >= QUERY_HEADS + KV_HEADS", "head >= QUERY_HEADS + KV_HEADS - 1"),
    "turned the other way": ("x * cos - y * sin", "x * cos + y * sin"),
    "weights exchanged": ("tl.where(is_query, 0, DIM)", "tl.where(is_query, DIM, 0)"),
    "norm of one half": ("tl.sum(x * x, 1) + tl.sum(y * y, 1)", "2 * tl.sum(x * x, 1)"),
    "no eps": ("/ DIM + eps", "/ DIM + 0.01 + eps"),
    "wrong place in the block": ("(slot % BLOCK) * DIM", "((slot + 1) % BLOCK) * DIM"),
    "K and V exchanged": ("offset = (head - QUERY_HEADS)", "offset = (all_heads - 1 - head)"),
    "heads left out": ("triton.cdiv(all_heads, heads)", "max(1, all_heads // heads)"),
}


@pytest.mark.parametrize("name", ROPE_MUTANTS)
def test_rope_mutants_are_found(name: str, tmp_path: Path) -> None:
    kernel = mutated(rope_store, *ROPE_MUTANTS[name], tmp_path).rope_store
    with pytest.raises(AssertionError):
        check_rope_store(CASES["smollm2"], 5, normed=True, device=DEVICE, kernel=kernel)


def test_wrong_arguments_are_sentences() -> None:
    inputs = decode_inputs(CASES["llama"], DEVICE)
    with pytest.raises(ValueError, match="out has shape"):
        call(inputs, torch.empty(2, 2, 2))
    with pytest.raises(ValueError, match="q must be"):
        call(replace(inputs, q=inputs.q.double()), torch.zeros_like(inputs.q))
