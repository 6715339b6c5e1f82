"""The circuit breaker and the ejection of outliers, by a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.health import (
    EJECT_BASE_SECONDS,
    OPEN_BASE_SECONDS,
    OPEN_MAX_SECONDS,
    CallHealth,
    Circuit,
    HealthLimits,
    eject_outliers,
)  # fmt: skip

LIMITS = HealthLimits(breaker_failures=3, outlier_calls=10)


def broken(now: float = 0.0) -> CallHealth:
    health = CallHealth(LIMITS)
    for _ in range(LIMITS.breaker_failures):
        health.unreachable(now)
    return health


def test_failures_in_a_row_open_the_circuit() -> None:
    health = CallHealth(LIMITS)
    health.unreachable(0.0)
    health.unreachable(0.0)
    assert health.circuit(0.0) is Circuit.CLOSED
    assert health.is_suspect(0.0)
    health.answered(0.0)
    health.unreachable(0.0)
    assert health.circuit(0.0) is Circuit.CLOSED, "not in a row"
    assert broken().circuit(0.0) is Circuit.OPEN


def test_one_probe_at_a_time_and_its_answer_closes() -> None:
    health = broken()
    later = OPEN_BASE_SECONDS
    assert health.circuit(later - 0.1) is Circuit.OPEN
    assert health.circuit(later) is Circuit.HALF_OPEN
    assert health.sent(later)
    assert health.circuit(later) is Circuit.PROBING
    assert not health.sent(later), "a second one is no probe"
    health.answered(later)
    assert health.circuit(later) is Circuit.CLOSED
    assert not health.sent(later)


def test_a_probe_that_tells_nothing_makes_room_for_another() -> None:
    health = broken()
    health.sent(OPEN_BASE_SECONDS)
    health.withdrawn()
    assert health.circuit(OPEN_BASE_SECONDS) is Circuit.HALF_OPEN


def test_each_failed_probe_doubles_the_pause_up_to_a_bound() -> None:
    health, now, pauses = broken(), 0.0, []
    for _ in range(8):
        start = now
        while health.circuit(now) is Circuit.OPEN:
            now += 0.25
        pauses.append(now - start)
        assert health.sent(now)
        health.unreachable(now)
    assert pauses[:4] == [OPEN_BASE_SECONDS * 2**n for n in range(4)]
    assert pauses[-1] == OPEN_MAX_SECONDS


def test_calls_that_were_lost_together_count_as_one_opening() -> None:
    """A backend that dies takes hundreds of calls along."""
    health = CallHealth(LIMITS)
    for _ in range(300):
        health.unreachable(5.0)
    assert health.circuit(5.0 + OPEN_BASE_SECONDS * 2) is Circuit.HALF_OPEN


@given(st.lists(st.tuples(st.sampled_from("safuw"), st.floats(0, 20)), max_size=60))
def test_no_call_is_let_through_an_open_circuit(events: list[tuple[str, float]]) -> None:
    """Whatever happens: never two probes, and an answer always closes."""
    health, now, probes = CallHealth(LIMITS), 0.0, 0
    for event, pause in events:
        now += pause
        if event == "s" and health.circuit(now) not in (Circuit.OPEN, Circuit.PROBING):
            probes += health.sent(now)
        elif event == "a":
            health.answered(now)
            probes = 0
            assert health.circuit(now) is Circuit.CLOSED
        elif event in "fuw" and probes:
            {"f": health.failed, "u": health.unreachable}.get(event, lambda _: None)(now)
            health.withdrawn()
            probes = 0
        elif event == "u":
            health.unreachable(now)
        assert probes <= 1


# Outliers -------------------------------------------------------------------------------------


def fleet(*failing: float) -> list[CallHealth]:
    """Backends that have failed this part of 100 calls at 0."""
    backends = []
    for part in failing:
        health = CallHealth(LIMITS)
        for n in range(100):
            (health.failed if n < 100 * part else health.answered)(0.0)
        backends.append(health)
    return backends


def test_one_that_fails_most_of_its_calls_is_ejected_for_a_while() -> None:
    backends = fleet(0.0, 0.9, 0.1, 0.0)
    assert eject_outliers(backends, 0.0, LIMITS) == [backends[1]]
    assert backends[1].is_ejected(EJECT_BASE_SECONDS - 0.1)
    assert not backends[1].is_ejected(EJECT_BASE_SECONDS)
    assert eject_outliers(backends, 0.0, LIMITS) == []


def test_ejected_again_it_stays_away_longer() -> None:
    (health,) = fleet(1.0)
    health.eject(0.0)
    health.eject(EJECT_BASE_SECONDS + 1)
    assert health.is_ejected(2.9 * EJECT_BASE_SECONDS)


def test_not_more_than_a_part_of_all_is_ejected() -> None:
    """When all fail it is the calls, or what stands behind all backends."""
    backends = fleet(0.8, 0.9, 1.0, 0.7)
    assert eject_outliers(backends, 0.0, LIMITS) == [backends[2], backends[1]]
    assert eject_outliers(backends, 0.0, LIMITS) == []
    assert eject_outliers(fleet(1.0), 0.0, LIMITS) == [], "the only one"


def test_few_calls_say_nothing_and_old_ones_are_forgotten() -> None:
    health = CallHealth(LIMITS)
    for _ in range(LIMITS.outlier_calls - 1):
        health.failed(0.0)
    assert health.failure_rate(0.0) == 0.0
    health.failed(0.0)
    assert health.failure_rate(0.0) == 1.0
    assert health.failure_rate(10.1) == 0.0
