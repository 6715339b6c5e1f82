"""A backend's state follows from its load stream and from how calls went."""

from __future__ import annotations

from typing import Any, cast

import pytest

from protos.neo.v1 import engine_pb2 as engine
from router.backend import Backend
from router.calls import SETTLE_SECONDS
from router.health import SUSPECT_BASE_SECONDS
from router.views import BackendState

STALE_SECONDS = 2.0


def snapshot(state: engine.EngineState = engine.ENGINE_STATE_SERVING) -> engine.LoadSnapshot:
    return engine.LoadSnapshot(
        state=state, gpu=engine.TierLoad(total_blocks=10, free_blocks=4, running_requests=2),
        host=engine.TierLoad(total_blocks=20, free_blocks=20), block_tokens=16,
    )  # fmt: skip


@pytest.fixture
def backend() -> Backend:
    return Backend("x:1", cast(Any, None), STALE_SECONDS)


def state(backend: Backend, now: float) -> BackendState:
    return backend.assess(now)[0]


def test_down_until_it_reports(backend: Backend) -> None:
    assert state(backend, 0.0) is BackendState.DOWN
    backend.snapshot(snapshot(), 1.0)
    assert backend.assess(1.0) == (BackendState.UP, "")


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        (engine.ENGINE_STATE_DRAINING, BackendState.DRAINING),
        (engine.ENGINE_STATE_STARTING, BackendState.DOWN),
        (engine.ENGINE_STATE_UNSPECIFIED, BackendState.DOWN),
    ],
)
def test_it_says_itself_that_it_takes_no_calls(
    backend: Backend, reported: engine.EngineState, expected: BackendState
) -> None:
    backend.snapshot(snapshot(reported), 1.0)
    assert state(backend, 1.0) is expected


def test_a_broken_stream_is_suspect_and_a_second_failure_is_down(backend: Backend) -> None:
    backend.snapshot(snapshot(), 1.0)
    backend.watch_failed("reset")
    assert backend.assess(1.1) == (BackendState.SUSPECT, "reset")
    backend.watch_failed("refused")
    assert backend.assess(1.2) == (BackendState.DOWN, "refused")
    backend.snapshot(snapshot(), 2.0)
    assert state(backend, 2.0) is BackendState.UP


def test_an_old_snapshot_is_suspect(backend: Backend) -> None:
    backend.snapshot(snapshot(), 1.0)
    assert state(backend, 1.0 + STALE_SECONDS) is BackendState.UP
    assert state(backend, 1.01 + STALE_SECONDS) is BackendState.SUSPECT


def test_failed_calls_back_off_and_an_answer_forgives(backend: Backend) -> None:
    backend.snapshot(snapshot(), 1.0)
    backend.call_failed(1.0)
    assert state(backend, 1.0 + 0.9 * SUSPECT_BASE_SECONDS) is BackendState.SUSPECT
    assert state(backend, 1.0 + 1.1 * SUSPECT_BASE_SECONDS) is BackendState.UP
    backend.call_failed(1.0)
    assert state(backend, 1.0 + 1.9 * SUSPECT_BASE_SECONDS) is BackendState.SUSPECT
    backend.call_answered(1.0)
    assert state(backend, 1.0) is BackendState.UP
    assert backend.failures_total == 2


def test_calls_younger_than_the_snapshot_are_unseen(backend: Backend) -> None:
    backend.snapshot(snapshot(), 1.0)
    with backend.call(0.5), backend.call(1.0 - SETTLE_SECONDS / 2), backend.call(1.5):
        view = backend.view(1.6)
        assert (view.own.open, view.own.unseen) == (3, 2)
        backend.snapshot(snapshot(), 2.0)
        assert backend.view(2.0).own.unseen == 0
    assert backend.view(2.0).own.open == 0
    assert backend.calls.total == 3


def test_a_call_that_raises_is_closed_too(backend: Backend) -> None:
    with pytest.raises(RuntimeError), backend.call(1.0):
        raise RuntimeError
    assert backend.in_flight == 0


def test_the_view_adds_both_tiers(backend: Backend) -> None:
    backend.snapshot(snapshot(), 1.0)
    load = backend.view(1.0).load
    assert load is not None
    assert (load.total_tokens, load.used_tokens, load.running_requests) == (480, 96, 2)
