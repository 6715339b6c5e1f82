"""The GPU kernels against fp64: on a CUDA device where there is one, else in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

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


def test_wrong_arguments_are_sentences() -> None:
    inputs = decode_inputs(CASES["llama"], DEVICE)
    with pytest.raises(ValueError, match="out has shape"):
        call(inputs, torch.empty(2, 2, 2))
    with pytest.raises(ValueError, match="q must be"):
        call(replace(inputs, q=inputs.q.double()), torch.zeros_like(inputs.q))
