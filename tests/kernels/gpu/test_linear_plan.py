"""Dense layers by chosen algorithms: the choice anywhere, the products on a CUDA device only."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernels.gpu import linear_plan
from kernels.gpu.linear_lt import Algorithm, CublasLt, LtProduct
from kernels.gpu.linear_plan import LinearPlan, plan_linear, torch_linear
from tests.support.gpu_cases import BOUND, error

on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SHAPES = {
    "one row": (1, 256, 512),
    "wide": (24, 1024, 256),
    "deep": (128, 256, 4096),
    "many rows": (333, 512, 640),
    "ragged": (37, 200, 328),
    "odd": (5, 77, 129),
}
"""Rows, outputs, inputs."""


class FakeProduct:
    """Names of algorithms, which `times` maps to microseconds."""

    times: dict[str, float]

    def __init__(self, *_: object) -> None:
        pass

    def algorithms(self) -> list[str]:
        return [name for name in self.times if name != "torch"]

    def run(self, algorithm: str, *_: object) -> None:
        assert algorithm in self.times


def chosen(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> str:
    """Whose way is taken for 3 rows. A way takes the time that its name has in `times`."""

    def graph_us(calls: list[partial[None]], *_: object) -> float:
        return times["torch" if calls[0].func is torch_linear else calls[0].args[0]]

    monkeypatch.setattr(FakeProduct, "times", times, raising=False)
    monkeypatch.setattr(linear_plan, "LtProduct", FakeProduct)
    monkeypatch.setattr(linear_plan, "graph_us", graph_us)
    library: Any = SimpleNamespace(stream=None)
    plan = plan_linear(library, [torch.zeros(16, 8)], None, [3, 3])
    if not plan.rows:
        return "torch"
    assert plan.rows == (3,)
    way: Any = plan._ways[3]
    return str(way.args[0])


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"torch": 10.0, "a": 9.0, "b": 8.0}, "b"),
        ({"torch": 10.0, "a": 8.0, "b": 9.0, "c": 9.5, "d": 9.6}, "a"),
        ({"torch": 10.0, "a": 9.9}, "torch"),
        ({"torch": 10.0, "a": 12.0}, "torch"),
        ({"torch": 10.0}, "torch"),
    ],
)
def test_the_fastest_way_is_taken_if_it_is_clearly_faster(
    times: dict[str, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(monkeypatch, times) == expected


def test_other_numbers_of_rows_go_torchs_way() -> None:
    taken: list[int] = []

    def way(x: torch.Tensor, *_: object) -> None:
        taken.append(x.shape[0])

    plan = LinearPlan({4: way})
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 8, generator=draw), torch.randn(6, generator=draw)
    for rows in (3, 4):
        x, out = torch.randn(rows, 8, generator=draw), torch.full((rows, 6), 7.0)
        for given in (None, bias):
            plan(x, weight, given, out)
            truth = torch.nn.functional.linear(
                x.double(), weight.double(), None if given is None else bias.double()
            )
            assert (rows == 4) == (error(out, truth) > 1e-6)
    assert taken == [4, 4]


def test_weights_rotate_past_the_cache() -> None:
    small, large = [torch.zeros(4, 4)] * 3, [torch.empty(48 << 20, dtype=torch.uint8)] * 5
    assert len(linear_plan._cold(small)) == 32
    assert sum(weight.nbytes for weight in linear_plan._cold(large)) >= linear_plan._COLD_BYTES
    assert len(linear_plan._cold([torch.empty(1 << 30, dtype=torch.uint8)])) == 4


def test_an_algorithm_has_the_librarys_layout() -> None:
    assert ctypes.sizeof(Algorithm) == 96
    assert Algorithm.workspace_bytes.offset == 64
    assert Algorithm.state.offset == 72


def test_a_failure_of_the_library_is_an_error() -> None:
    library = CublasLt.__new__(CublasLt)
    library._library = SimpleNamespace(good=lambda *_: 0, bad=lambda *_: 7)  # type: ignore[assignment]
    library.call("good", 1, 2)
    with pytest.raises(RuntimeError, match="bad returned 7"):
        library.call("bad", 1, 2)


def case(name: str, dtype: torch.dtype, biased: bool) -> tuple[torch.Tensor, ...]:
    rows, outputs, inputs = SHAPES[name]
    torch.manual_seed(rows)
    made = (torch.randn(shape) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    x, weight, bias = (tensor.to("cuda", dtype) for tensor in made)
    return x, weight, *((bias * 8,) if biased else ())


def check(
    way: Callable[..., None], x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor
) -> None:
    """Error at most BOUND times torch's own, rows around untouched."""
    # 8 rows are a multiple of 16 bytes, whatever their width.
    guarded = torch.full((x.shape[0] + 16, weight.shape[0]), 7.0, dtype=x.dtype, device=x.device)
    out = guarded[8:-8]
    out.fill_(float("nan"))
    way(x, weight, bias[0] if bias else None, out)
    wide = [tensor.double() for tensor in (x, weight, *bias)]
    truth = torch.nn.functional.linear(*wide)
    theirs = error(torch.nn.functional.linear(x, weight, *bias), truth)
    assert error(out, truth) <= BOUND * theirs
    assert (guarded[:8] == 7).all()
    assert (guarded[-8:] == 7).all()


@pytest.fixture(scope="module")
def library() -> CublasLt:
    return CublasLt(torch.device("cuda"))


class TestOnDevice:
    pytestmark = on_device

    @pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("name", SHAPES)
    def test_every_algorithm_is_right(
        self, name: str, dtype: torch.dtype, biased: bool, library: CublasLt
    ) -> None:
        x, weight, *bias = case(name, dtype, biased)
        product = LtProduct(library, x.shape[0], weight, bias[0] if bias else None)
        found = product.algorithms()
        assert found or x.shape[1] % 8
        for algorithm in found:
            assert algorithm.workspace_bytes <= library.workspace.nbytes
            library.workspace.fill_(255)
            check(partial(product.run, algorithm), x, weight, *bias)

    def test_the_check_finds_mistakes(self, library: CublasLt) -> None:
        x, weight, bias = case("deep", torch.bfloat16, biased=True)
        product = LtProduct(library, x.shape[0], weight, bias)
        run = partial(product.run, product.algorithms()[0])

        def without_an_input(x: torch.Tensor, *others: Any) -> None:
            run(torch.cat((x[:, :-1], torch.zeros_like(x[:, :1])), 1), *others)

        def without_bias(
            x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: Any
        ) -> None:
            run(x, weight, torch.zeros_like(bias), out)

        def rounded(x: torch.Tensor, *others: Any) -> None:
            run(x.to(torch.float8_e4m3fn).to(x.dtype), *others)

        for mistake in (without_an_input, without_bias, rounded):
            with pytest.raises(AssertionError):
                check(mistake, x, weight, bias)

    def test_a_plan_is_right_in_a_graph_and_with_biases_of_its_own(self, library: CublasLt) -> None:
        layers = [case("deep", torch.bfloat16, biased=True) for _ in range(2)]
        weights, biases = (
            [layer[1] for layer in layers],
            [layer[2] * (n + 1) for n, layer in enumerate(layers)],
        )
        plan = plan_linear(library, weights, biases[0], [1, 16, 128])
        x = layers[0][0]
        outs = [torch.empty(128, 256, dtype=x.dtype, device="cuda") for _ in weights]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight, bias, out in zip(weights, biases, outs, strict=True):
                plan(x, weight, bias, out)
        for _ in range(2):
            graph.replay()
            for weight, bias, out in zip(weights, biases, outs, strict=True):
                check(lambda *given, out=out: given[3].copy_(out), x, weight, bias)

    def test_the_same_plan_gives_the_same_bits(self, library: CublasLt) -> None:
        x, weight = case("deep", torch.bfloat16, biased=False)
        product = LtProduct(library, x.shape[0], weight, None)
        for algorithm in product.algorithms():
            outs = [torch.empty(128, 256, dtype=x.dtype, device="cuda") for _ in range(3)]
            for out in outs:
                product.run(algorithm, x, weight, None, out)
            assert torch.equal(outs[0], outs[1])
            assert torch.equal(outs[0], outs[2])

    def test_wrong_arguments_are_refused(self, library: CublasLt) -> None:
        x, weight = case("wide", torch.bfloat16, biased=False)
        product = LtProduct(library, x.shape[0], weight, None)
        run = partial(product.run, product.algorithms()[0])
        out = torch.empty(24, 1024, dtype=x.dtype, device="cuda")
        for wrong in (
            (x[:8], weight, None, out),
            (x, weight[:512], None, out),
            (x, weight, None, out[:8]),
        ):
            with pytest.raises(ValueError, match="has shape"):
                run(*wrong)
        with pytest.raises(ValueError, match="start at"):
            run(
                torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x),
                weight,
                None,
                out,
            )
