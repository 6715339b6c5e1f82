"""fp8 by the book, in fp64 and without torch's own conversion; and models of `transformers` whose
layers compute that way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.models import reference_model


def rounded_e4m3(x: torch.Tensor) -> torch.Tensor:
    """fp64: the nearest of the values sign * (8..15) * 2^(-9..5) and the subnormals, ties to
    even; at most 448."""
    x = x.double()
    exponent = torch.frexp(x).exponent.clamp_min(-5) - 1
    step = torch.exp2((exponent - 3).double())
    return (torch.round(x / step) * step).clamp(-448, 448)


def fake_quantised(x: torch.Tensor) -> torch.Tensor:
    """Each row (last dimension) as its e4m3 codes times their scale, in x's dtype."""
    scale = x.double().abs().amax(-1, keepdim=True).clamp_min(2.0**-60) / 448
    return (rounded_e4m3(x.double() / scale) * scale).to(x.dtype)


def fp8_reference(
    directory: Path, dtype: torch.dtype = torch.float32, *, weights_too: bool = True
) -> Any:
    """`reference_model` with rows quantised before each layer's weights, and those, too."""
    model = reference_model(directory, torch.float32)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            if weights_too:
                with torch.no_grad():
                    module.weight.copy_(fake_quantised(module.weight))
            module.register_forward_pre_hook(_quantise_input)
    return model.to(dtype)


def _quantise_input(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> Any:
    return (fake_quantised(arguments[0]),)


Quantise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`[rows, width]` -> codes and scales."""

EDGES = (0.0, -0.0, 1e-30, 448.0, -1.0, 1.0625, 1.1875, 2.0**-9, 2.0**-10, 3 * 2.0**-10)


def rows_of_all_kinds(width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """`[7, width]`: random rows of several sizes, ties, zeros, tiny and huge values."""
    draw = torch.Generator().manual_seed(width)
    sizes = torch.tensor([1.0, 1e-4, 3e3, 0.0, 1e-30])[:, None]
    rows = torch.randn(5, width, generator=draw) * sizes
    edges = torch.tensor(EDGES).repeat(-(-width // len(EDGES)))[:width]
    edges[0] = 448.0  # the scale is 1: codes are the values
    huge = torch.full((width,), 3e4)
    return torch.cat([rows, edges[None], huge[None]]).to(dtype).to(device)


def check_quantise(quantise: Quantise, x: torch.Tensor) -> None:
    """Against the oracle: the scale exactly, each code the nearest but where fp32's rounding put
    the quotient on the other side of a tie."""
    codes, scales = quantise(x)
    kept = x.double().abs().amax(-1).clamp_min(2.0**-60)
    torch.testing.assert_close(scales.double(), kept / 448, rtol=1e-6, atol=0)
    exact = x.double() * 448 / kept[:, None]
    truth, found = rounded_e4m3(exact), codes.double()
    assert not found.isnan().any()
    different = found != truth
    assert different.double().mean() <= 2e-3
    error, best = (found - exact).abs(), (truth - exact).abs()
    assert (error <= best + 1e-5 * exact.abs().clamp_min(2.0**-9)).all()
