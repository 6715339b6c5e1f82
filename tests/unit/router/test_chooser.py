"""Which backends serve a call's model, and which policy decides among them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from neo_common.errors import Reason, ServiceError
from router.chooser import Chooser
from router.keys import CallKeys
from router.policies.pressure import least_pressure
from router.views import BackendState, BackendView, CallView


def view(address: str, state: BackendState = BackendState.UP) -> BackendView:
    return BackendView(address, state, None)


def first(backends: Sequence[BackendView], call: CallView) -> BackendView:
    return min(backends, key=lambda backend: backend.address)


def last(backends: Sequence[BackendView], call: CallView) -> BackendView:
    return max(backends, key=lambda backend: backend.address)


SERVED = [
    (("small",), view("a")), (("large",), view("b")), (("large", "adapter"), view("c")),
]  # fmt: skip


def chosen(model: str, **settings: str) -> str | None:
    chooser = Chooser(first, {"large": last}, **settings)
    return chooser.choose(SERVED, CallKeys(model))


def test_a_model_is_looked_for_where_it_is_served() -> None:
    assert chosen("small") == "a"
    assert chosen("adapter") == "c"


def test_a_model_may_have_a_policy_of_its_own() -> None:
    assert chosen("large") == "c"
    assert Chooser(first).choose(SERVED, CallKeys("large")) == "b"


def test_an_unknown_model_is_told_what_there_is() -> None:
    with pytest.raises(ServiceError) as caught:
        chosen("huge")
    assert caught.value.reason is Reason.UNKNOWN_MODEL
    assert caught.value.field == "model"
    assert "there are adapter, large, small" in caught.value.message


def test_no_model_means_the_default_or_the_only_one() -> None:
    with pytest.raises(ServiceError) as caught:
        chosen("")
    assert caught.value.reason is Reason.UNKNOWN_MODEL
    assert chosen("", default_model="adapter") == "c"
    assert Chooser(first).choose(SERVED[:1], CallKeys()) == "a"


def test_backends_that_have_not_said_are_asked_for_what_nobody_has() -> None:
    silent = [((), view("x")), *SERVED]
    assert Chooser(first).choose(silent, CallKeys("huge")) == "x"
    assert Chooser(last).choose(silent, CallKeys("small")) == "a"
    assert Chooser(first).choose(silent[:1], CallKeys()) == "x"
    down = [((), view("x", BackendState.DOWN)), *SERVED]
    assert Chooser(first).choose(down, CallKeys("huge")) is None, "it may serve it: try later"


def test_ties_go_round() -> None:
    chooser = Chooser(least_pressure)
    served = [((), view(name)) for name in "abc"]
    assert {chooser.choose(served, CallKeys()) for _ in range(3)} == set("abc")


def test_no_backends_at_all() -> None:
    assert Chooser(first).choose([], CallKeys("any")) is None
