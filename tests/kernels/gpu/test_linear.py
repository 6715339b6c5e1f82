"""Dense layers against fp64: ragged tiles, tiles split over any number of programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from kernels.gpu import linear as linear_module
from kernels.gpu.linear import LinearWorkspace, Tiling, linear
from kernels.gpu.tensors import INTERPRET
from tests.support.gpu_cases import BOUND, error
from tests.support.mutants import mutated

DEVICE = "cpu" if INTERPRET else "cuda"
SMALL = Tiling(outputs=64, rows=16, depth=32, warps=4, stages=3, programs=5)


@dataclass(frozen=True)
class LinearCase:
    rows: int
    outputs: int
    inputs: int
    programs: int = 5
    bias: bool = False


CASES = {
    "whole tiles": LinearCase(32, 128, 64, programs=4),
    "one row": LinearCase(1, 64, 96),
    "ragged": LinearCase(37, 200, 72, bias=True),
    "narrow": LinearCase(3, 8, 8, bias=True),
    "two programs a tile": LinearCase(16, 192, 128, programs=6),
    "many programs a tile": LinearCase(5, 72, 520, programs=23, bias=True),
    "more programs than steps": LinearCase(20, 136, 40, programs=50),
    "one program": LinearCase(40, 136, 104, programs=1),
}


@dataclass
class LinearInputs:
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    tiling: Tiling

    def oracle(self, dtype: torch.dtype) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.linear(self.x.to(dtype), self.weight.to(dtype), bias)


def linear_inputs(case: LinearCase, dtype: torch.dtype = torch.bfloat16) -> LinearInputs:
    draw = torch.Generator().manual_seed(case.rows)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(DEVICE, dtype)

    bias = normal(case.outputs) * 8 if case.bias else None
    tiling = Tiling(64, 16, 32, warps=4, stages=3, programs=case.programs)
    return LinearInputs(
        normal(case.rows, case.inputs), normal(case.outputs, case.inputs), bias, tiling
    )


def check_linear(inputs: LinearInputs, module: ModuleType = linear_module) -> torch.Tensor:
    """Error at most BOUND times torch's own, rows around untouched, the workspace as it was."""
    shape = (inputs.x.shape[0] + 2, inputs.weight.shape[0])
    guarded = torch.full(shape, 7.0, dtype=inputs.x.dtype, device=DEVICE)
    workspace = module.LinearWorkspace((inputs.tiling,), DEVICE)
    workspace.parts.fill_(float("nan"))
    module.linear(inputs.x, inputs.weight, inputs.bias, guarded[1:-1], inputs.tiling, workspace)
    truth = inputs.oracle(torch.float64)
    assert error(guarded[1:-1], truth) <= BOUND * error(inputs.oracle(inputs.x.dtype), truth)
    assert (guarded[0] == 7).all()
    assert (guarded[-1] == 7).all()
    assert not workspace.ready.any()
    return guarded[1:-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_linear(name: str, dtype: torch.dtype) -> None:
    check_linear(linear_inputs(CASES[name], dtype))


def test_the_same_call_gives_the_same_bits_with_one_workspace() -> None:
    inputs = linear_inputs(CASES["many programs a tile"])
    workspace = LinearWorkspace((inputs.tiling,), DEVICE)
    outs = [torch.empty(5, 72, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    for out in outs:
        linear(inputs.x, inputs.weight, inputs.bias, out, inputs.tiling, workspace)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_row_does_not_depend_on_others() -> None:
    inputs = linear_inputs(CASES["ragged"])
    whole = check_linear(inputs)
    inputs.x[7:] = float("nan")
    workspace = LinearWorkspace((inputs.tiling,), DEVICE)
    out = torch.empty_like(whole)
    linear(inputs.x, inputs.weight, inputs.bias, out, inputs.tiling, workspace)
    assert torch.equal(out[:7], whole[:7])
    assert out[7:].isnan().all()


# They must end: a program that waits for what never comes hangs the interpreter.
MUTANTS = {
    "a step left out": ("end - start):", "end - start - 1):", "one row"),
    "a part left out": ("total += tl.load", "total += 0.0 * tl.load", "two programs a tile"),
    "a part twice": ("total += tl.load(part", "total += 2.0 * tl.load(part", "ragged"),
    "a part not handed back": ("before, 0, sem", "before, 1, sem", "two programs a tile"),
    "another tile's weights": ("row_tiles * OUTPUTS,", "row_tiles % 1 * OUTPUTS,", "ragged"),
    "another tile's rows": ("row_tiles * ROWS", "row_tiles % 1 * ROWS", "ragged"),
    "no bias": ("total += bias.to(tl.float32)[:, None]", "total += 0.0", "ragged"),
    "bias of another tile": ("at = output + tl", "at = 0 * output + tl", "ragged"),
    "inputs of another step": ("[row, step * DEPTH]", "[row, step // 2 * DEPTH]", "whole tiles"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name: str, tmp_path: Path) -> None:
    old, new, case = MUTANTS[name]
    module = mutated(linear_module, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_linear(linear_inputs(CASES[case]), module)


def test_wrong_arguments_are_refused() -> None:
    inputs = linear_inputs(CASES["ragged"])
    workspace = LinearWorkspace((SMALL,), DEVICE)
    out = torch.empty(37, 200, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="weight"):
        linear(inputs.x, inputs.weight[:, :64], None, out, SMALL, workspace)
    with pytest.raises(ValueError, match="multiples of 8"):
        linear(
            inputs.x,
            inputs.weight[:195].contiguous(),
            None,
            out[:, :195].contiguous(),
            SMALL,
            workspace,
        )
    with pytest.raises(ValueError, match="x must be"):
        linear(inputs.x.float(), inputs.weight, None, out, SMALL, workspace)
