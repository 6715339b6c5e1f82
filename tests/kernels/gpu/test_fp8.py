"""The fp8 kernels against an fp64 oracle, in the interpreter where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")
from gpu_service.model.fp8 import Fp8Rows, quantised_rows
from kernels.gpu import fp8_quantize
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.silu_mul import silu_mul
from kernels.gpu.tensors import INTERPRET
from tests.support.fp8 import check_quantise, rows_of_all_kinds
from tests.support.mutants import mutated

DEVICE = "cpu" if INTERPRET else "cuda"
WIDTHS = (16, 48, 1000) if INTERPRET else (16, 48, 1000, 8192, 28672, 32768)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5

pytestmark = pytest.mark.skipif(
    not INTERPRET and not torch.cuda.is_available(),
    reason="needs a CUDA device or TRITON_INTERPRET=1",
)


def by_kernel(x: torch.Tensor, module: ModuleType = fp8_quantize) -> Fp8Rows:
    rows = poisoned(*x.shape)
    module.quantise_rows(x, rows.codes, rows.scales)
    return rows


def poisoned(rows: int, width: int) -> Fp8Rows:
    """NaN everywhere, so that what is not written shows."""
    codes = torch.full((rows, width), float("nan"), device=DEVICE).to(fp8_quantize.E4M3)
    return Fp8Rows(codes, torch.full((rows,), float("nan"), device=DEVICE))


def check(module: ModuleType, width: int, dtype: torch.dtype) -> None:
    def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = by_kernel(x, module)
        return rows.codes, rows.scales

    check_quantise(quantise, rows_of_all_kinds(width, dtype, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_quantise_rows(width: int, dtype: torch.dtype) -> None:
    check(fp8_quantize, width, dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_cpu_devices_codes_are_the_same(width: int) -> None:
    x = rows_of_all_kinds(width, torch.bfloat16, DEVICE)
    ours, theirs = by_kernel(x), quantised_rows(x)
    torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-6, atol=0)
    assert (ours.codes.float() != theirs.codes.float()).double().mean() < 2e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 47])
def test_rows_that_are_not_finite(bad: float, place: int) -> None:
    x = torch.randn(3, 48, device=DEVICE)
    x[1, place] = bad
    for rows in (by_kernel(x), quantised_rows(x)):
        assert rows.scales.isnan().tolist() == [False, True, False]
        assert not rows.codes.float().isnan().any()  # beside the scale, codes harm nobody


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.div_rn(_LARGEST, kept)", "(240.0 / kept)"),
        ("kept * (1.0 / _LARGEST)", "kept * (1.0 / 240.0)"),
        ("tl.maximum(largest, _SMALLEST)", "tl.maximum(tl.sum(tl.abs(x), 0) / WIDTH, _SMALLEST)"),
        ("tl.max(tl.where(finite, tl.abs(x), float(\"inf\")), 0)", "tl.max(x, 0)"),
        ("at = tl.arange(0, WIDTH_PAD)\n    ok = at < WIDTH\n    x =",
         "at = tl.arange(0, WIDTH_PAD)\n    ok = at < WIDTH - 1\n    x ="),
        ("row * WIDTH + at, _e4m3_bits", "0 * WIDTH + at, _e4m3_bits"),
    ],
)  # fmt: skip
def test_mutants_fail(old: str, new: str, tmp_path: Path) -> None:
    mutant = mutated(fp8_quantize, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(mutant, 1000, torch.float32)


@pytest.mark.skipif(not INTERPRET, reason="a device rounds in hardware")
@pytest.mark.parametrize(
    ("old", "new"),
    [("+ 8388608.0 - 8388608.0", "+ 0.5"), ("- 127, -6)", "- 127, -7)"), ("code + 128", "code")],
)
def test_mutants_of_rounding_by_hand_fail(old: str, new: str, tmp_path: Path) -> None:
    test_mutants_fail(old, new, tmp_path)


def same(ours: Fp8Rows, theirs: Fp8Rows) -> None:
    """But for codes at which the last bit of what was quantised made a difference."""
    torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-2 if INTERPRET else 1e-3, atol=0)
    a, b = ours.codes.float() * ours.scales[:, None], theirs.codes.float() * theirs.scales[:, None]
    assert (a - b).norm() <= 5e-3 * b.norm() + 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("first", [True, False])
def test_add_rms_norm_quantise(first: bool, width: int, rows: int, dtype: torch.dtype) -> None:
    """As the two kernels one after the other."""
    torch.manual_seed(width)
    x, residual = (torch.randn(rows, width, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(width, device=DEVICE).to(dtype)
    ours, added = poisoned(rows, width), None if first else residual.clone()
    fp8_quantize.add_rms_norm_quantise(x, added, weight, ours.codes, ours.scales, eps=EPS)
    normed, theirs = torch.empty_like(x), None if first else residual.clone()
    add_rms_norm(x, theirs, weight, normed, eps=EPS)
    same(ours, by_kernel(normed))
    if added is not None and theirs is not None:
        assert torch.equal(added, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul_quantise(width: int, rows: int, dtype: torch.dtype) -> None:
    """As the two kernels one after the other."""
    torch.manual_seed(width)
    gate_up = torch.randn(rows, 2 * width, device=DEVICE).to(dtype)
    ours, gated = poisoned(rows, width), torch.empty(rows, width, dtype=dtype, device=DEVICE)
    fp8_quantize.silu_mul_quantise(gate_up, ours.codes, ours.scales)
    silu_mul(gate_up, gated)
    same(ours, by_kernel(gated))


@pytest.mark.parametrize(
    ("old", "new"),
    [("x = rounded.to", "x = x.to"), ("/ WIDTH + eps", "/ WIDTH_PAD + eps"),
     ("place + WIDTH, mask", "place, mask"), ("gate * tl.sigmoid(gate)", "tl.sigmoid(gate)")],
)  # fmt: skip
def test_mutants_of_fused_kernels_fail(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = mutated(fp8_quantize, old, new, tmp_path)
    for name in ("add_rms_norm_quantise", "silu_mul_quantise"):
        monkeypatch.setattr(fp8_quantize, name, getattr(mutant, name))

    def check_both() -> None:
        test_add_rms_norm_quantise(first=False, width=1000, rows=3, dtype=torch.float32)
        test_silu_mul_quantise(width=1000, rows=3, dtype=torch.float32)

    with pytest.raises(AssertionError):
        check_both()


def test_wrong_arguments() -> None:
    x, rows = torch.randn(2, 32, device=DEVICE), poisoned(2, 32)
    with pytest.raises(ValueError, match="scales must be"):
        fp8_quantize.quantise_rows(x, rows.codes, rows.scales.half())
    with pytest.raises(ValueError, match="codes has shape"):
        fp8_quantize.quantise_rows(x[:1].contiguous(), rows.codes, rows.scales)
    wide = poisoned(1, 32784)
    with pytest.raises(ValueError, match="width must be at most 32768"):
        fp8_quantize.quantise_rows(wide.codes.float(), wide.codes, wide.scales)
