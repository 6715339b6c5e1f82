"""Deadlines, limits and places in the queue; the tenants file; what requests cost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from neo_common.errors import Reason
from neo_common.grpc.principal import PRIORITY_KEY
from protos.compat import kserve_pb2 as kserve
from protos.compat import vllm_engine_pb2 as vllm
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types
from router.admission import cost
from router.admission.core import AdmissionCore
from router.admission.policy import (
    Policy,
    PriorityClass,
    SharedLimits,
    TenantLimits,
    load_policy,
    parse_policy,
)
from router.admission.tickets import Refusal, State, Ticket

HIGH, NORMAL, LOW = PriorityClass.HIGH, PriorityClass.NORMAL, PriorityClass.LOW
STREAM = "/neo.v1.InferenceService/GenerateStream"
UNARY = "/neo.v1.InferenceService/Generate"


def core(default: TenantLimits | None = None, **shared: float) -> AdmissionCore:
    values = {"max_running": 1, **shared}
    return AdmissionCore(Policy(SharedLimits(**values), default or TenantLimits()))  # type: ignore[arg-type]


def paced(**shared: float) -> tuple[AdmissionCore, Ticket, float]:
    """One that starts a request of cost 10 every second, the running one, and the time."""
    found = core(**shared)
    running = found.submit("a", NORMAL, 10, 0.0)
    now = 0.0
    for _ in range(20):
        waiting = found.submit("a", NORMAL, 10, now)
        now += 1.0
        found.end(running, now)
        assert found.turn(now) == [waiting]
        running = waiting
    return found, running, now


def refusal(found: AdmissionCore, *args: object, **named: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        found.submit(*args, **named)  # type: ignore[arg-type]
    return caught.value


# Deadlines --------------------------------------------------------------------------------------


def test_a_wait_beyond_the_deadline_is_refused_at_once() -> None:
    found, _, now = paced()
    for _ in range(5):
        found.submit("a", NORMAL, 10, now, seconds_left=100.0)
    refused = refusal(found, "a", NORMAL, 10, now, seconds_left=3.0)
    assert refused.reason is Reason.WAIT_TOO_LONG
    assert 4 <= refused.retry_after <= 8, "six requests, one a second"
    assert found.submit("a", NORMAL, 10, now, seconds_left=10.0).state is State.WAITING


def test_a_short_wait_of_another_tenant_is_known() -> None:
    """The newcomer's share is half of the pace, and it is alone in it."""
    found, _, now = paced(max_wait_seconds=1000.0)
    for _ in range(50):
        found.submit("a", NORMAL, 10, now)
    assert found.submit("b", NORMAL, 10, now, seconds_left=3.0).state is State.WAITING
    assert refusal(found, "a", NORMAL, 10, now, seconds_left=3.0).reason is Reason.WAIT_TOO_LONG
    assert found.submit("c", HIGH, 10, now, seconds_left=3.0).state is State.WAITING


def test_a_slower_pace_is_seen_while_nothing_starts() -> None:
    found, _, now = paced()
    found.submit("a", NORMAL, 10, now)
    assert found.submit("a", NORMAL, 10, now, seconds_left=4.0).state is State.WAITING
    later = now + 25.0  # and still nothing has ended
    assert refusal(found, "a", NORMAL, 10, later, seconds_left=4.0).reason is Reason.WAIT_TOO_LONG


def test_a_bad_time_is_forgotten() -> None:
    """Else nobody with a deadline would ever wait again, and show that things go faster now."""
    found, running, now = paced()
    found.submit("a", NORMAL, 10, now)
    assert found.turn(now + 29.0) == []
    found.turn(now + 31.0)  # its time was up
    assert found.waiting == 0
    soon = refusal(found, "a", NORMAL, 10, now + 32.0, seconds_left=1.0)
    assert soon.reason is Reason.WAIT_TOO_LONG
    assert found.submit("a", NORMAL, 10, now + 60.0, seconds_left=1.0).state is State.WAITING
    found.end(running, now + 60.1)
    assert found.turn(now + 60.1)


def test_whose_time_is_up_is_dropped() -> None:
    found = core(max_wait_seconds=10.0)
    found.submit("a", NORMAL, 10, 0.0)
    first = found.submit("a", NORMAL, 10, 0.0, seconds_left=2.0)
    second = found.submit("a", NORMAL, 10, 0.0)
    assert found.next_expiry() == 2.0
    assert found.turn(1.9) == []
    assert found.turn(2.0) == [first]
    assert first.refusal is not None
    assert first.refusal.reason is Reason.WAIT_TOO_LONG
    assert found.next_expiry() == 10.0
    found.end(second, 3.0)
    assert found.next_expiry() == math.inf


# Limits of a tenant -----------------------------------------------------------------------------


def test_a_tenant_at_its_limit_waits_and_does_not_hold_up_others() -> None:
    found = core(TenantLimits(max_running=1), max_running=0)
    first = found.submit("a", NORMAL, 10, 0.0)
    second = found.submit("a", HIGH, 10, 0.0)
    assert (first.state, second.state) == (State.RUNNING, State.WAITING)
    assert found.submit("b", LOW, 10, 0.0).state is State.RUNNING
    assert found.turn(1.0) == []
    found.end(first, 1.0)
    assert found.turn(1.0) == [second]


def test_a_tenants_limit_holds_over_all_classes() -> None:
    found = core(TenantLimits(max_running=1), max_running=2)
    others = [found.submit(name, NORMAL, 10, 0.0) for name in "bc"]
    urgent, other = (found.submit("a", rank, 10, 0.0) for rank in (HIGH, NORMAL))
    for ticket in others:
        found.end(ticket, 1.0)
    assert found.turn(1.0) == [urgent], "though there is room for two"
    found.end(urgent, 2.0)
    assert found.turn(2.0) == [other]


def test_tokens_are_reserved_and_given_back() -> None:
    found = core(TenantLimits(tokens_per_minute=600.0), max_running=0)
    ticket = found.submit("a", NORMAL, 500, 0.0)
    refused = refusal(found, "a", NORMAL, 200, 0.0)
    assert refused.reason is Reason.RATE_LIMITED
    assert refused.retry_after == pytest.approx(10.0), "100 tokens at 10 a second"
    assert found.submit("b", NORMAL, 200, 0.0).state is State.RUNNING, "each has its own"
    found.end(ticket, 0.0, used=50.0)
    assert found.submit("a", NORMAL, 550, 0.0).state is State.RUNNING
    assert refusal(found, "a", NORMAL, 10, 0.0).reason is Reason.RATE_LIMITED


def test_unknown_use_stays_reserved_and_a_refused_one_is_not() -> None:
    limits = TenantLimits(tokens_per_minute=600.0, requests_per_minute=60.0, max_running=1)
    found = core(limits, max_running=0)
    ticket = found.submit("a", NORMAL, 300, 0.0)
    waiting = found.submit("a", NORMAL, 300, 0.0)
    found.end(waiting, 0.0)  # its client left
    found.end(ticket, 0.0)
    assert found.submit("a", NORMAL, 300, 0.0).state is State.RUNNING
    assert refusal(found, "a", NORMAL, 1, 0.0).reason is Reason.RATE_LIMITED


def test_a_request_larger_than_the_burst_goes_when_the_bucket_is_full() -> None:
    found = core(TenantLimits(tokens_per_minute=60.0, burst_tokens=100.0), max_running=0)
    assert found.submit("a", NORMAL, 400, 0.0).state is State.RUNNING
    assert refusal(found, "a", NORMAL, 400, 399.0).reason is Reason.RATE_LIMITED
    assert found.submit("a", NORMAL, 400, 400.0).state is State.RUNNING


def test_requests_per_minute() -> None:
    found = core(TenantLimits(requests_per_minute=2.0), max_running=0)
    for _ in range(2):
        found.submit("a", NORMAL, 1, 0.0)
    assert refusal(found, "a", NORMAL, 1, 0.0).retry_after == pytest.approx(30.0)


def test_a_higher_class_than_allowed_is_lowered() -> None:
    found = core(TenantLimits(max_class="low"))
    assert found.submit("a", HIGH, 1, 0.0).rank is LOW


# A full queue -----------------------------------------------------------------------------------


def test_who_floods_a_full_queue_loses_its_newest() -> None:
    found = core(max_queued=4)
    found.submit("flood", NORMAL, 10, 0.0)
    queued = [found.submit("flood", NORMAL, 10, 0.0) for _ in range(4)]
    assert refusal(found, "flood", NORMAL, 10, 0.0).reason is Reason.QUEUE_FULL
    newcomer = found.submit("other", NORMAL, 10, 0.0)
    assert newcomer.state is State.WAITING
    assert found.turn(0.0) == [queued[-1]]
    assert queued[-1].refusal is not None
    assert queued[-1].refusal.reason is Reason.QUEUE_FULL
    assert found.waiting == 4


def test_urgent_requests_find_a_place_in_a_full_queue() -> None:
    found = core(max_queued=4)
    found.submit("a", LOW, 10, 0.0)
    for _ in range(4):
        found.submit("a", LOW, 10, 0.0)
    assert found.submit("a", HIGH, 10, 0.0).state is State.WAITING


def test_a_tenant_has_its_own_part_of_the_queue() -> None:
    found = core(TenantLimits(max_queued=1))
    found.submit("a", NORMAL, 10, 0.0)
    found.submit("a", NORMAL, 10, 0.0)
    assert refusal(found, "a", NORMAL, 10, 0.0).reason is Reason.QUEUE_FULL
    assert found.submit("b", NORMAL, 10, 0.0).state is State.WAITING


def test_without_a_queue_what_does_not_fit_is_refused() -> None:
    found = core(max_queued=0)
    found.submit("a", NORMAL, 10, 0.0)
    assert refusal(found, "a", NORMAL, 10, 0.0).reason is Reason.QUEUE_FULL


def test_backends_without_room_make_requests_wait() -> None:
    found = core(max_running=0)
    waiting = [found.submit("a", NORMAL, 10, 0.0, room=0) for _ in range(3)]
    assert found.turn(0.0, room=2) == waiting[:2]
    assert found.turn(0.0, room=0) == []
    assert found.turn(0.0) == waiting[2:]


# The file ---------------------------------------------------------------------------------------


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(
        "max_running: 64\n"
        "default: {max_running: 8}\n"
        "tenants:\n  acme: {weight: 4, tokens_per_minute: 600000}\n  '42': {max_class: low}\n"
    )
    policy = load_policy(str(path))
    assert policy.shared.max_running == 64
    assert policy.of("anybody").max_running == 8
    assert policy.of("acme") == TenantLimits(weight=4.0, tokens_per_minute=600_000.0)
    assert policy.of("42").highest is LOW
    assert (policy.label("acme"), policy.label("anybody")) == ("acme", "other")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "mapping"),
        ({"max_runing": 3}, "did you mean max_running"),
        ({"max_running": -1}, "max_running"),
        ({"max_wait_seconds": 0}, "max_wait_seconds"),
        ({"low_weight": 0}, "low_weight"),
        ({"bytes_per_token": 0}, "bytes_per_token"),
        ({"default": {"weight": 0}}, "default: weight"),
        ({"default": 3}, "default"),
        ({"tenants": ["acme"]}, "tenants"),
        ({"tenants": {42: {}}}, "quote it"),
        ({"tenants": {"acme": {"max_class": "urgent"}}}, "tenants.acme: max_class"),
        ({"tenants": {"acme": {"burst_tokens": 5}}}, "tokens_per_minute"),
        ({"tenants": {"acme": {"max_queued": "many"}}}, "max_queued"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(content: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_policy(content)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        load_policy(str(tmp_path / "none"))
    (tmp_path / "bad").write_text("a: [")
    with pytest.raises(ValueError, match="not YAML"):
        load_policy(str(tmp_path / "bad"))
    (tmp_path / "empty").write_text("")
    assert load_policy(str(tmp_path / "empty")) == Policy()


# What requests cost -----------------------------------------------------------------------------

SHARED = SharedLimits(default_output_tokens=100, bytes_per_token=4.0)


def total(path: str, message: object) -> float:
    return cost.asked(path, message.SerializeToString(), (), SHARED).cost.total(SHARED)  # type: ignore[attr-defined]


def test_costs_of_native_requests() -> None:
    ids = types.TokenIds(ids=[1, 2, 300_000])
    sampling = types.SamplingParams(max_tokens=50, n=2)
    request = inference.GenerateRequest(token_ids=ids, sampling=sampling)
    assert total(STREAM, request) == 3 + 2 * 50
    assert total(UNARY, inference.GenerateRequest(text="a" * 40)) == 10 + 100
    chat = types.Chat(messages=[types.ChatMessage(role="user", content="x" * 396)])
    assert 200 < total(UNARY, inference.GenerateRequest(chat=chat)) < 210
    no_output = inference.GenerateRequest(sampling=types.SamplingParams(n=3))
    assert total(UNARY, no_output) == 300


def test_costs_of_other_protocols() -> None:
    request = vllm.GenerateRequest(
        tokenized=vllm.TokenizedInput(input_ids=[1] * 9),
        sampling_params=vllm.SamplingParams(max_tokens=5),
    )
    assert total("/vllm.grpc.engine.VllmEngine/Generate", request) == 14
    infer = kserve.ModelInferRequest(raw_input_contents=[b"x" * 400])
    infer.parameters["max_tokens"].int64_param = 7
    assert 107 <= total("/inference.GRPCInferenceService/ModelInfer", infer) < 120


def test_what_cannot_be_read_counts_by_its_size() -> None:
    found = cost.asked(STREAM, b"\xff" * 400, (), SHARED)
    assert found.cost.total(SHARED) == 200
    assert cost.used(STREAM, 1, b"\xff") is None


def test_priorities() -> None:
    request = inference.GenerateRequest(scheduling=types.SchedulingParams(priority=-3))
    data = request.SerializeToString()
    assert cost.asked(STREAM, data, (), SHARED).priority == -3
    assert cost.asked(STREAM, data, ((PRIORITY_KEY, "7"),), SHARED).priority == 7
    for wrong in ("high", "101", "1.5", ""):
        with pytest.raises(ValueError, match="whole number"):
            cost.asked(STREAM, data, ((PRIORITY_KEY, wrong),), SHARED)
    assert [PriorityClass.of(n) for n in (-1, 0, 1)] == [LOW, NORMAL, HIGH]


def test_what_was_used_is_in_the_last_message() -> None:
    usage = types.Usage(prompt_tokens=3, completion_tokens=4)
    last = inference.GenerateStreamResponse(usage=usage).SerializeToString()
    assert cost.used(STREAM, 1, last) == 7
    assert cost.used(UNARY, 1, inference.GenerateResponse(usage=usage).SerializeToString()) == 7
    assert cost.used(STREAM, 1, inference.GenerateStreamResponse().SerializeToString()) is None
    complete = vllm.GenerateComplete(prompt_tokens=2, completion_tokens=9)
    ended = vllm.GenerateResponse(complete=complete).SerializeToString()
    assert cost.used("/vllm.grpc.engine.VllmEngine/Generate", 1, ended) == 11
    assert cost.used("/vllm.grpc.engine.VllmEngine/Generate", 2, ended) is None
    assert cost.used("/inference.GRPCInferenceService/ModelInfer", 1, b"") is None
