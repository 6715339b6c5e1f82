"""fp8 weights on a CUDA device: the layer's product, and the engine's tokens against a
`transformers` model that is quantised by the book."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu_service.model.fp8 import Fp8Linear, Fp8Rows, quantise_weight
from tests.support.engine import config, greedy, real_core, run
from tests.support.fp8 import fake_quantised, fp8_reference
from tests.support.models import FAMILIES, tiny_model_dir
from tests.support.numerics import check_teacher_forced

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LENGTHS = (1, 15, 16, 17, 61)
OUTPUT = 24


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 24, 120, 333])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 160), (2560, 2048), (2048, 7168)])
def test_product(outputs: int, inputs: int, rows: int, bias: bool) -> None:
    """At most four times as wrong as bf16 on the dequantised operands: on an H100 fp8 sums are
    kept in some 14 bits (2.1 times in the worst case here, 0.6% of the result)."""
    torch.manual_seed(rows)
    weight = torch.randn(outputs, inputs) * 0.02
    x = (torch.randn(rows, inputs) * torch.rand(rows, 1) * 5).bfloat16()
    added = torch.randn(outputs).bfloat16() if bias else None
    quantised = Fp8Rows.empty(outputs, inputs, torch.device("cuda"))
    quantise_weight(weight, quantised)
    on_device = None if added is None else added.cuda()
    linear = Fp8Linear(quantised, torch.bfloat16, on_device)
    ours = linear(x.cuda()).double().cpu()
    w, codes = fake_quantised(weight.double()), fake_quantised(x.double())
    truth = codes @ w.T + (0 if added is None else added.double())
    theirs = (codes.bfloat16().cuda() @ w.bfloat16().cuda().T).double().cpu()
    allowed = (theirs - codes @ w.T).norm()
    assert (ours - truth).norm() <= 4 * allowed
    bad = x.clone()
    bad[0, 3] = float("nan")
    result = linear(bad.cuda())
    assert result[0].isnan().all()
    assert result[1:].isfinite().all()


@pytest.mark.parametrize("max_batch_tokens", [7, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens(family: str, max_batch_tokens: int, tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path, family, head_dim=16)
    made = config(
        directory,
        device="cuda",
        dtype="bfloat16",
        quantization="fp8",
        max_batch_tokens=max_batch_tokens,
    )
    prompts = [[3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS]
    asked = [greedy(f"r{i}", prompt, OUTPUT, logprobs=0) for i, prompt in enumerate(prompts)]
    with real_core(made) as core:
        answers = run(core, asked)
    check_teacher_forced(
        fp8_reference(directory),
        fp8_reference(directory, torch.bfloat16),
        prompts,
        [answers.tokens[f"r{i}", 0] for i in range(len(LENGTHS))],
        [answers.logprobs[f"r{i}", 0] for i in range(len(LENGTHS))],
    )
