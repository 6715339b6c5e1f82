"""What a policy sees, made up for tests."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from hypothesis import strategies as st

from router.calls import OwnCalls
from router.views import BackendState, BackendView, CallView, LoadView, TierView

_OWN = {field.name for field in fields(OwnCalls)}
_LOAD = {field.name for field in fields(LoadView)}
_GPU = {field.name for field in fields(TierView)}


def view(address: str, **changes: Any) -> BackendView:
    """An idle UP one with 16,000 tokens of KV on the GPU. `changes` are fields of the view, of its
    load, of the load's GPU tier or of our own calls."""
    gpu = replace(TierView(total_tokens=16_000), **_part(changes, _GPU))
    load = replace(LoadView(gpu, TierView(), max_waiting_requests=64), **_part(changes, _LOAD))
    own = replace(OwnCalls(), **_part(changes, _OWN))
    rest = {k: v for k, v in changes.items() if k not in _OWN | _LOAD | _GPU}
    return replace(BackendView(address, BackendState.UP, load, own), **rest)


def _part(changes: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if name in names}


counts = st.integers(0, 1000)
tiers = st.builds(
    TierView,
    total_tokens=st.integers(0, 100_000),
    used_tokens=st.integers(0, 100_000),
    running_requests=counts,
    freed_tokens_per_second=st.floats(0, 1e6),
    token_seconds=st.floats(0, 10),
)
loads = st.builds(
    LoadView,
    gpu=tiers,
    host=tiers,
    waiting_requests=counts,
    waiting_prompt_tokens=st.integers(0, 1_000_000),
    max_waiting_requests=st.integers(0, 100),
    prompt_tokens_per_second=st.floats(0, 1e6),
)
own_calls = st.builds(
    OwnCalls,
    open=counts,
    unseen=counts,
    unseen_waiting_tokens=counts,
    waiting_tokens=counts,
    waited_tokens=counts,
    oldest_tokens=counts,
    oldest_seconds=st.floats(0, 100),
)
names = st.text("abcdefgh0123456789.:", min_size=1, max_size=20)


def views(max_size: int = 8, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists of backends with addresses of their own; `fixed` are strategies for fields."""
    chosen = {
        "state": st.sampled_from(BackendState), "load": st.none() | loads, "own": own_calls,
        "age_seconds": st.floats(0, 100), **fixed,
    }  # fmt: skip
    return st.lists(
        st.builds(BackendView, address=names, **chosen),
        max_size=max_size,
        unique_by=lambda backend: backend.address,
    )


def calls(addresses: st.SearchStrategy[str] = names) -> st.SearchStrategy[CallView]:
    """With and without a session, a prefix, places where that was before."""
    prefixes = st.lists(st.binary(min_size=8, max_size=8), max_size=6)

    def build(prefix: list[bytes], known: list[str], **rest: Any) -> CallView:
        return CallView(prefix=tuple(prefix), known=tuple(known[: len(prefix)]), **rest)

    return st.builds(
        build,
        prefix=prefixes,
        known=st.lists(addresses | st.just(""), min_size=6, max_size=6),
        prompt_tokens=st.integers(0, 100_000),
        session=st.binary(max_size=20),
        turn=st.integers(0, 2**40),
        chance=st.floats(0, 1, exclude_max=True),
    )
