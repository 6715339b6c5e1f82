"""The predicted wait, term by term."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.policies.wait import least_wait, predicted_wait
from router.views import BackendView, CallView, LoadView, TierView
from tests.support.views import calls, view, views

CALL = CallView(prompt_tokens=1000)


def wait(**changes: object) -> float:
    return predicted_wait(view("a", prompt_tokens_per_second=1000.0, **changes), CALL)


def test_nobody_waits_where_there_is_room() -> None:
    assert wait() == 0
    assert wait(used_tokens=8000, running_requests=8) == 0


def test_prompts_ahead_are_computed_first() -> None:
    assert wait(waiting_requests=2, waiting_prompt_tokens=3000) == pytest.approx(3.0)
    assert wait(unseen=1, unseen_waiting_tokens=500) == pytest.approx(0.5)


def test_what_others_sent_is_worked_off_while_the_snapshot_ages() -> None:
    queue = {"waiting_requests": 2, "waiting_prompt_tokens": 3000}
    assert wait(**queue, age_seconds=1.0) == pytest.approx(2.0)
    assert wait(**queue, age_seconds=10.0) == 0


def test_of_our_own_it_is_known_which_have_begun() -> None:
    """The snapshot is as old, but only half of ours wait still."""
    queue = {"waiting_requests": 2, "waiting_prompt_tokens": 3000, "waited_tokens": 3000}
    assert wait(**queue, waiting_tokens=1500) == pytest.approx(1.5)
    assert wait(**queue, waiting_tokens=1500, oldest_tokens=800, oldest_seconds=0.5) == 1.0
    assert wait(**queue, waiting_tokens=0) == 0


def test_calls_that_show_no_first_message_do_not_count_for_ever() -> None:
    """Unary ones: the snapshot says that hardly anything waits."""
    assert wait(waiting_tokens=100_000, used_tokens=2000, running_requests=4) <= 0.5


def test_kv_that_is_lacking_is_waited_for() -> None:
    full = {"used_tokens": 16_000, "running_requests": 16, "freed_tokens_per_second": 500.0}
    assert wait(**full) == pytest.approx((1.2 * 1000 + 0.5 * 1000) / 500)
    assert wait(**full, age_seconds=1.0) == pytest.approx(1.7 / 0.5 - 1.0)
    assert wait(**full, unseen=2) == pytest.approx(2000 / 500 + 1.7 / 0.5)


def test_the_host_tier_takes_what_the_gpu_has_no_room_for() -> None:
    full = {"used_tokens": 16_000, "running_requests": 16, "freed_tokens_per_second": 500.0}
    host = TierView(total_tokens=50_000, token_seconds=0.25)
    assert wait(**full, host=host) == pytest.approx(0.25), "a token of the CPU's backlog"
    busy = TierView(total_tokens=50_000, token_seconds=30.0)
    assert wait(**full, host=busy) == pytest.approx(3.4), "a CPU that is busy is no help"


def test_a_long_prompt_does_not_go_to_a_slow_backend_because_it_is_idle() -> None:
    slow = view("slow", prompt_tokens_per_second=1000.0)
    quick = view(
        "quick", prompt_tokens_per_second=20_000.0, waiting_requests=1, waiting_prompt_tokens=1000
    )
    assert least_wait([slow, quick], CallView(prompt_tokens=4000)).address == "quick"
    assert least_wait([slow, quick], CallView(prompt_tokens=10)).address == "slow"


def test_alike_waits_are_decided_by_kv() -> None:
    a = view("a", used_tokens=5000, running_requests=5, prompt_tokens_per_second=10_001.0)
    b = view("b", used_tokens=4000, running_requests=5, prompt_tokens_per_second=10_000.0)
    assert least_wait([a, b], CALL).address == "b"


def test_a_backend_without_any_report_counts_its_calls() -> None:
    assert predicted_wait(view("a", load=None, open=3), CALL) == 3.0


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(views(load=st.none()) | views(), calls())
def test_waits_are_numbers_that_order_backends(backends: list[BackendView], call: CallView) -> None:
    for backend in backends:
        assert predicted_wait(backend, call) >= 0


@given(st.integers(0, 100_000), st.integers(0, 50), st.integers(0, 50))
def test_more_ahead_is_never_less_wait(tokens: int, queued: int, more: int) -> None:
    def of(waiting: int) -> float:
        load = LoadView(
            TierView(total_tokens=50_000, used_tokens=40_000, running_requests=40),
            TierView(), waiting_requests=waiting, waiting_prompt_tokens=waiting * 100,
        )  # fmt: skip
        return predicted_wait(view("a", load=load), CallView(prompt_tokens=tokens))

    assert of(queued + more) >= of(queued)
