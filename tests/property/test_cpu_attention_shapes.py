"""Shapes that nobody thought of: CPU decode attention against the float64 oracle."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.cpu import DType, ThreadPool
from tests.support.cpu_attention import TORCH, Case, Sequences, check


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 5))
    return Case(
        lengths=tuple(draw(st.lists(st.integers(1, 1300), min_size=1, max_size=4))),
        query_heads=kv_heads * draw(st.integers(1, 16)),
        kv_heads=kv_heads,
        head_dim=16 * draw(st.integers(1, 16)),
        block_tokens=draw(st.sampled_from((16, 32, 64))),
        kv=draw(st.sampled_from(list(DType))),
        activation=draw(st.sampled_from(list(TORCH))),
        window=draw(st.integers(0, 800)),
        softcap=draw(st.sampled_from((0.0, 5.0, 50.0))),
        spread=draw(st.sampled_from((0.1, 1.0, 8.0))),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), append=st.booleans(), count=st.integers(1, 3))
def test_any_shape_agrees_with_the_oracle(case: Case, append: bool, count: int) -> None:
    sequences = Sequences(case, append)
    with ThreadPool(count) as threads:
        check(sequences, *sequences.attend(threads))
