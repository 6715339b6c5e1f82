"""Keys stay where they are, and popular ones drown nobody."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.policies.affinity import (
    FREE_REQUESTS,
    LOAD_FACTOR,
    PLACING_BLOCKS,
    bounds,
    in_order,
    prefix_affinity,
    session_affinity,
)  # fmt: skip
from router.policies.wait import least_wait
from router.prefixes import BLOCK_BYTES, PrefixIndex, names_of
from router.views import BackendView, CallView
from tests.support.views import calls, view, views

KEYS = [f"key {n}".encode() for n in range(2000)]


def owners(backends: list[BackendView]) -> list[str]:
    return [in_order(backends, key)[0].address for key in KEYS]


@pytest.mark.parametrize("count", [2, 5, 10])
def test_a_backend_that_goes_moves_its_own_keys_alone(count: int) -> None:
    backends = [view(f"10.0.0.{n}:7001") for n in range(count)]
    before, after = owners(backends), owners(backends[1:])
    moved = [one for one, two in zip(before, after, strict=True) if one != two]
    assert set(moved) == {backends[0].address}
    assert len(moved) / len(KEYS) == pytest.approx(1 / count, rel=0.25)
    assert before == owners(backends[::-1]), "their order does not matter"


def test_keys_are_shared_by_room() -> None:
    backends = [view("a", total_tokens=30_000), view("b", total_tokens=10_000)]
    share = Counter(owners(backends))["a"] / len(KEYS)
    assert share == pytest.approx(0.75, abs=0.04)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(views(max_size=6), st.data())
def test_bounded_load_holds(backends: list[BackendView], data: st.DataObject) -> None:
    """However popular a key is: what is taken by affinity stays below the bound, and there is
    always somebody below it."""
    if not backends:
        return
    limits = bounds(backends)
    total = sum(backend.requests for backend in backends)
    assert sum(limits.values()) > total
    call = data.draw(calls(st.sampled_from([backend.address for backend in backends])))
    for chosen in (
        session_affinity(backends, replace(call, session=b"one")),
        prefix_affinity(backends, replace(call, prefix=(b"one",), known=call.known[:1])),
    ):
        assert chosen.requests < limits[chosen.address]


def test_the_bound_is_a_quarter_above_the_share() -> None:
    backends = [view(name, open=20, running_requests=20) for name in "abcd"]
    assert set(bounds(backends).values()) == {math.ceil(LOAD_FACTOR * 81 / 4)}
    assert set(bounds([view("a"), view("b")]).values()) == {FREE_REQUESTS}


def test_a_session_goes_home_and_next_door_while_that_is_full() -> None:
    backends = [view(name, running_requests=10) for name in "abcd"]
    home, neighbour = in_order(backends, b"s")[:2]
    call = CallView(session=b"s")
    assert session_affinity(backends, call) is home
    crowded = [replace(b, own=replace(b.own, unseen=10)) if b is home else b for b in backends]
    assert session_affinity(crowded, call).address == neighbour.address


def test_without_a_key_the_wait_decides() -> None:
    backends = [view("a", used_tokens=1000), view("b")]
    for policy in (session_affinity, prefix_affinity):
        assert policy(backends, CallView()) is least_wait(backends, CallView())


def test_the_longest_beginning_that_is_known_decides() -> None:
    backends = [view(name) for name in "abc"]
    prefix = (b"0", b"1", b"2", b"3")
    known = ("a", "b", "c", "")
    assert prefix_affinity(backends, CallView(prefix=prefix, known=known)).address == "c"
    gone = CallView(prefix=prefix, known=("a", "b", "gone", ""))
    assert prefix_affinity(backends, gone).address == "b"
    crowded = [backends[0], backends[1], view("c", running_requests=30)]
    assert prefix_affinity(crowded, CallView(prefix=prefix, known=known)).address == "b"


def test_new_beginnings_are_placed_by_their_first_blocks() -> None:
    """So routers agree about prompts that none of them has seen."""
    backends = [view(str(n)) for n in range(10)]
    start = tuple(bytes([n]) for n in range(PLACING_BLOCKS))
    chosen = {
        prefix_affinity(backends, CallView(prefix=(*start, end), known=("",) * 5)).address
        for end in (b"x", b"y", b"z")
    }
    assert chosen == {in_order(backends, start[-1])[0].address}


def test_names_are_those_of_whole_blocks() -> None:
    prompt = bytes(range(256)) * 5
    names = names_of(prompt)
    assert len(names) == len(prompt) // BLOCK_BYTES
    assert names_of(prompt + b"more")[: len(names)] == names
    assert names_of(prompt[:-1]) == names[:-1]
    assert names_of(b"other" + prompt)[0] != names[0]
    assert names_of(b"") == ()
    assert not set(names_of(prompt, "a")) & set(names_of(prompt, "b"))


def test_the_index_forgets_what_was_not_used_for_longest() -> None:
    index = PrefixIndex(entries=4)
    index.record((b"a", b"ab"), "one")
    index.record((b"x", b"xy"), "two")
    index.record((b"a", b"ac"), "three")
    assert len(index) == 4
    assert index.known((b"a", b"ab", b"x", b"xy", b"ac")) == ("three", "", "two", "two", "three")
