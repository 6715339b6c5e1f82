"""Dense layers of few rows, `y = x @ weight.T + bias`, their work cut evenly over the programs.

    tile       `outputs` weight rows by `rows` rows of x; one step of it is `depth` inputs
    program p  steps [all * p / P, all * (p + 1) / P) of all tiles' steps in a row, from the last
               to the first

    steps      |--- tile 0 ---|--- tile 1 ---|--- tile 2 ---|
    programs   |---- 0 ----|---- 1 ----|---- 2 ----|-- 3 ---|

(Stream-K, arXiv 2301.03598.) Whoever has a tile's last step writes the tile. It comes to those
steps last of all and then adds the parts of programs before it, who had theirs first of all: it
hardly waits, waits for programs started earlier only, and adds in a fixed order. Weight rows are
the left operand: tensor cores take 64 of those at a time, but any 8 rows of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gpu.tensors import INTERPRET, check


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; the result does not depend on it but for rounding."""

    outputs: int
    """Weight rows of a tile, a power of two of at least 64."""
    rows: int
    """Rows of x of a tile, a power of two of at least 16."""
    depth: int
    """Inputs of a step, a power of two of at least 16."""
    warps: int
    stages: int
    programs: int
    """All have to fit on the device at a time, or some wait for others' start."""


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_desc,  # [rows, inputs]
    weight_desc,  # [outputs, inputs]
    bias_ptr,  # [outputs]
    out_desc,  # [rows, outputs]
    parts_ptr,  # fp32 [programs, OUTPUTS, ROWS]
    ready_ptr,  # int32 [programs]: 1 while that program's part waits; all 0 between launches
    rows,
    outputs,
    inputs,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    row_tiles, steps = tl.cdiv(rows, ROWS), tl.cdiv(inputs, DEPTH)
    work = row_tiles * tl.cdiv(outputs, OUTPUTS) * steps
    begin = work * program // programs
    end = work * (program + 1) // programs
    within = tl.arange(0, OUTPUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    while end > begin:
        tile = (end - 1) // steps
        # Tiles of the same weights are neighbours: the second finds them in the L2 cache.
        output, row = tile // row_tiles * OUTPUTS, tile % row_tiles * ROWS
        start = tile * steps
        first = tl.maximum(begin, start)
        total = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for step in range(first - start, end - start):
            weight = weight_desc.load([output, step * DEPTH])
            x = x_desc.load([row, step * DEPTH])
            if WIDEN:
                weight, x = weight.to(tl.float32), x.to(tl.float32)
            total = tl.dot(weight, tl.trans(x), total)
        if end < start + steps:
            part = parts_ptr + program.to(tl.int64) * (OUTPUTS * ROWS)
            tl.store(part + within, total)
            tl.debug_barrier()  # every thread's part is stored
            tl.atomic_xchg(ready_ptr + program, 1, sem="release")
        else:
            before = program
            have = first
            while have > start:
                before -= 1
                while tl.atomic_add(ready_ptr + before, 0, sem="acquire") == 0:
                    pass
                part = parts_ptr + before.to(tl.int64) * (OUTPUTS * ROWS)
                total += tl.load(part + within, cache_modifier=".cg")
                tl.debug_barrier()  # every thread has loaded it
                tl.atomic_xchg(ready_ptr + before, 0, sem="relaxed")
                have = work * before // programs
            if HAS_BIAS:
                at = output + tl.arange(0, OUTPUTS)
                bias = tl.load(bias_ptr + at, mask=at < outputs, other=0.0)
                total += bias.to(tl.float32)[:, None]
            out_desc.store([row, output], tl.trans(total.to(out_desc.dtype)))
        end = first


class LinearWorkspace:
    """Memory for the parts of split tiles; any number of launches on one stream may share it."""

    def __init__(self, tilings: tuple[Tiling, ...], device: torch.device | str) -> None:
        most = max(tiling.programs for tiling in tilings)
        size = max(tiling.programs * tiling.outputs * tiling.rows for tiling in tilings)
        self.parts = torch.empty(size, dtype=torch.float32, device=device)
        self.ready = torch.zeros(most, dtype=torch.int32, device=device)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiling: Tiling,
    workspace: LinearWorkspace,
) -> None:
    """`out = x @ weight.T + bias`, summed in fp32.

    x: bf16 or fp16 `[rows, inputs]`; weight: `[outputs, inputs]`; bias: `[outputs]`; out:
    `[rows, outputs]`. inputs and outputs: multiples of 8, as the copy engine wants it.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    check("x", x, (-1, -1), torch.bfloat16, torch.float16)
    check("weight", weight, (-1, inputs), x.dtype)
    check("out", out, (rows, outputs), x.dtype)
    if bias is not None:
        check("bias", bias, (outputs,), x.dtype)
    if inputs % 8 or outputs % 8:
        raise ValueError(f"inputs and outputs must be multiples of 8, not {inputs} and {outputs}")
    tiles = triton.cdiv(rows, tiling.rows) * triton.cdiv(outputs, tiling.outputs)
    # None without a step: others would wait for its part.
    programs = min(tiling.programs, tiles * triton.cdiv(inputs, tiling.depth))
    _linear_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [tiling.rows, tiling.depth]),
        TensorDescriptor.from_tensor(weight, [tiling.outputs, tiling.depth]),
        bias,
        TensorDescriptor.from_tensor(out, [tiling.rows, tiling.outputs]),
        workspace.parts,
        workspace.ready,
        rows,
        outputs,
        inputs,
        OUTPUTS=tiling.outputs,
        ROWS=tiling.rows,
        DEPTH=tiling.depth,
        HAS_BIAS=bias is not None,
        WIDEN=INTERPRET,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
