"""Decisions of the scheduler, one at a time."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import pytest

from gpu_service.engine.messages import TokenLogprob
from gpu_service.scheduling.plan import Failure, IterationPlan, SweepResult, Tier
from gpu_service.scheduling.scheduler import Scheduler
from neo_common.errors import Reason
from tests.support.fake_model import (
    Machine,
    expected_output,
    limits,
    machine_with,
    submit,
    tiers,
    token_at,
)


def last_batch(machine: Machine) -> tuple[list[int], list[int], list[int]]:
    """Keys of the last plan: prefill, GPU decode, host decode."""
    batches = machine.plans[-1].batches
    return (
        [r.key for b in batches for r in b.prefill],
        [r.key for b in batches for r in b.gpu_decode],
        [r.key for b in batches for r in b.host_decode],
    )


def test_scheduling_imports_no_torch() -> None:
    code = "import sys, gpu_service.scheduling.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "change",
    [
        {"offload": "sometimes"},
        {"gpu_blocks": -1},
        {"gpu_blocks": 0, "host_blocks": 0},
        {"max_batch_tokens": 0},
        {"max_waiting_requests": -1},
    ],
)
def test_senseless_limits_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|no KV blocks"):
        machine_with(**change)


def test_nothing_is_decided_while_the_host_works_on_rows_that_may_be_void() -> None:
    """Even if nobody wants them any more: the host may still write to their blocks, which would
    belong to others."""
    machine = Machine(Scheduler(limits(max_batch_tokens=64)), look_ahead=True)
    machine.submit(submit("host", 8, 30, placement="cpu_preferred"))
    machine.submit(submit("gpu", 8, 30, placement="gpu_only"))
    while not last_batch(machine)[2] if machine.plans else True:
        machine.step()
    machine.scheduler.abort("host", None, machine.now)
    assert machine._flight is not None
    assert tiers(machine) == {"gpu": Tier.GPU}
    assert not machine.scheduler.may_look_ahead
    machine.step()
    assert machine.scheduler.may_look_ahead
    machine.run()
    assert machine.looked_ahead > 1
    machine.check_empty()


# -- batches -------------------------------------------------------------------------------------


def test_decode_goes_before_prefill_and_prompts_are_chunked() -> None:
    machine = machine_with(max_batch_tokens=10, offload="never")
    machine.submit(submit("a", 4, 20))
    machine.step()
    machine.submit(submit("b", 25, 4))
    chunks = []
    for _ in range(3):
        machine.step()
        (batch,) = machine.plans[-1].batches
        chunks.append([len(row.token_ids) for row in batch.prefill])
        assert len(batch.gpu_decode) == 1
    assert chunks == [[9], [9], [7]]
    machine.step()
    assert last_batch(machine) == ([], [0, 1], [])


def test_more_decoding_choices_than_the_budget_take_turns() -> None:
    machine = machine_with(max_batch_tokens=3, max_running=8, gpu_blocks=64)
    for i in range(3):
        machine.submit(submit(f"r{i}", 2, 12, n=1))
    machine.run()
    lengths = {len(tokens) for tokens in machine.outputs.values()}
    assert lengths == {12}


# -- n > 1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [3, 4, 5, 8, 9, 31])
def test_choices_share_the_full_blocks_of_the_prompt(prompt: int) -> None:
    machine = machine_with(gpu_blocks=64, max_batch_tokens=64)
    request = submit("a", prompt, 5, n=3)
    machine.submit(request)
    machine.run()
    shared = (prompt - 1) // 4 * 4
    assert machine.usages["a"].cached_prompt_tokens == 2 * shared
    for index in range(3):
        assert machine.outputs["a", index] == expected_output(request)
    machine.check_empty()


def test_other_choices_start_when_the_first_is_aborted_during_its_prefill() -> None:
    machine = machine_with(max_batch_tokens=4, prefix_caching=False)
    request = submit("a", 20, 3, n=3)
    machine.submit(request)
    machine.step()
    machine.scheduler.abort("a", 0, machine.now)
    machine.run()
    assert set(machine.outputs) == {("a", 1), ("a", 2)}
    assert machine.usages["a"].cached_prompt_tokens == 16
    machine.check_empty()


# -- refusals and ends ---------------------------------------------------------------------------


def refusal(machine: Machine, request_id: str = "a") -> str:
    machine.step()
    return machine.refused[request_id]


def test_what_can_never_fit_is_refused() -> None:
    machine = machine_with(gpu_blocks=4, host_blocks=8, max_context_tokens=32)
    machine.submit(submit("a", 10, 10, placement="gpu_only"))
    assert refusal(machine) == "NEVER_FITS"
    machine.submit(submit("b", 10, 10))
    machine.submit(submit("c", 40, 1))
    machine.run()
    assert ("b", 0) in machine.finished
    assert machine.refused["c"] == "INVALID_ARGUMENT"


def test_max_tokens_beyond_the_context_ends_by_length() -> None:
    machine = machine_with(max_context_tokens=20)
    machine.submit(submit("a", 15, 500))
    machine.run()
    assert len(machine.outputs["a", 0]) == 5
    assert machine.finished["a", 0] == "length"


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    scheduler = Scheduler(limits(max_waiting_requests=2))
    for i in range(3):
        scheduler.submit(submit(f"r{i}", 4, 4), 0.0)
    (refused,) = scheduler.take_news().refusals
    assert refused.request_id == "r2"
    assert refused.reason == "QUEUE_FULL"
    assert refused.retry_after_seconds


def test_deadlines_end_requests_in_every_state() -> None:
    machine = machine_with(max_running=1, max_batch_tokens=8)
    machine.submit(submit("late", 4, 4, deadline=-1.0))
    machine.submit(submit("running", 4, 100, deadline=0.02))
    machine.submit(submit("waiting", 4, 4, deadline=0.01))
    machine.submit(submit("fine", 4, 4, deadline=900.0))
    machine.run()
    assert machine.refused == dict.fromkeys(("late", "running", "waiting"), "DEADLINE_EXCEEDED")
    assert ("fine", 0) in machine.finished
    machine.check_empty()


def test_the_deadline_list_does_not_grow_with_ended_requests() -> None:
    machine = machine_with()
    for i in range(500):
        machine.submit(submit(f"r{i}", 2, 1, deadline=1e9))
        machine.run()
    assert len(machine.scheduler._deadlines) < 80


def test_stop_tokens_and_min_tokens() -> None:
    request = submit("a", 8, 20)
    third = token_at(request.prompt_token_ids, 10)
    machine = machine_with()
    machine.submit(submit("a", 8, 20, stop_token_ids=(third,)))
    machine.run()
    assert machine.outputs["a", 0] == expected_output(request)[:3]
    assert machine.finished["a", 0] == "stop"


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_of_sequence(ignore_eos: bool) -> None:
    request = submit("a", 8, 6)
    second = token_at(request.prompt_token_ids, 9)
    machine = machine_with(eos_token_ids=frozenset({second}))
    machine.submit(submit("a", 8, 6, ignore_eos=ignore_eos))
    machine.run()
    assert len(machine.outputs["a", 0]) == (6 if ignore_eos else 2)
    assert machine.finished["a", 0] == ("length" if ignore_eos else "stop")


def test_usage_follows_an_indexed_abort_of_the_last_choice_and_no_other_abort() -> None:
    machine = machine_with()
    for name in ("whole", "indexed"):
        machine.submit(submit(name, 4, 50))
    machine.step()
    machine.step()
    machine.scheduler.abort("whole", None, machine.now)
    machine.scheduler.abort("indexed", 0, machine.now)
    machine.scheduler.abort("unknown", None, machine.now)
    machine.step()
    assert set(machine.usages) == {"indexed"}
    assert machine.usages["indexed"].completion_tokens == 2
    machine.check_empty()


def test_prompt_logprobs_come_once_and_whole_even_if_the_prefill_is_repeated() -> None:
    machine = machine_with(max_batch_tokens=6, gpu_blocks=64)
    request = submit("a", 20, 3, prompt_logprobs=0, n=2)
    machine.submit(request)
    told = []

    def with_logprobs(plan: IterationPlan, result: SweepResult) -> SweepResult:
        rows = [r for b in plan.batches for r in b.prefill if r.logprob_targets]
        found = {r.key: [TokenLogprob(t, -1.0, 1, []) for t in r.logprob_targets] for r in rows}
        if plan.number == 2:
            return SweepResult(lost=frozenset(found))
        return SweepResult(tokens=result.tokens, prompt_logprobs=found)

    take = machine.scheduler.take_news

    def listening() -> object:
        news = take()
        told.extend(news.prompt_logprobs)
        return news

    machine.scheduler.take_news = listening  # type: ignore[method-assign, assignment]
    while machine.scheduler.live_requests:
        machine.step(with_logprobs)
    (prompt,) = told
    assert [entry.token_id for entry in prompt.logprobs] == request.prompt_token_ids[1:]


@pytest.mark.parametrize("look_ahead", [False, True])
def test_prompt_logprobs_are_whole_after_a_prefill_that_made_room_for_others(
    look_ahead: bool,
) -> None:
    bounds = limits(offload="never", gpu_blocks=26, max_batch_tokens=2)
    machine = Machine(Scheduler(bounds), look_ahead=look_ahead)
    machine.submit(submit("old", 4, 70))
    machine.step()
    new = submit("new", 60, 2, arrival=1.0, prompt_logprobs=0)
    machine.submit(new)
    machine.run()
    assert machine.usages["new"].recomputations == 1
    assert machine.usages["old"].recomputations == 0
    assert machine.prompt_tokens["new"] == new.prompt_token_ids[1:]


@pytest.mark.parametrize("sampling", [{}, {"frequency_penalty": 1.0}, {"logprobs": 20}])
def test_only_what_the_device_does_not_draw_is_waited_for(sampling: dict[str, Any]) -> None:
    machine = Machine(Scheduler(limits(offload="never", gpu_blocks=64)), look_ahead=True)
    machine.submit(submit("a", 4, 20, **sampling))
    machine.run()
    assert machine.looked_ahead >= 19
    machine.submit(submit("b", 4, 20, **{"prompt_logprobs": 21, **sampling}))
    before = machine.looked_ahead
    machine.run()
    assert machine.looked_ahead == before


def test_a_failed_row_ends_its_request_alone() -> None:
    machine = machine_with()
    machine.submit(submit("bad", 4, 20))
    machine.submit(submit("good", 4, 20))

    def spoil(plan: IterationPlan, result: SweepResult) -> SweepResult:
        tokens = {key: token for key, token in result.tokens.items() if key != 0}
        return SweepResult(tokens=tokens, failed={0: Failure("NUMERICAL", "x")})

    machine.step(spoil)
    machine.run()
    assert machine.refused == {"bad": "NUMERICAL"}
    assert ("good", 0) in machine.finished


def test_every_reason_is_one_that_clients_know() -> None:
    """The scheduler spells reasons as strings, so that it need not import gRPC."""
    used = ("INVALID_ARGUMENT", "NEVER_FITS", "QUEUE_FULL", "DEADLINE_EXCEEDED", "HOST_TIER_LOST")
    for reason in (*used, "NUMERICAL", "OUT_OF_MEMORY"):
        assert Reason(reason)


# -- the tests' own machine can fail -------------------------------------------------------------


def test_the_machine_finds_dropped_migrations() -> None:
    machine = machine_with(force_migration_every=2)
    machine.submit(submit("a", 10, 20))
    original = machine.scheduler._still_valid
    machine.scheduler._still_valid = lambda migrations: original(migrations) and ()  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="wrong KV"):
        machine.run()


def test_the_machine_finds_blocks_shared_by_mistake() -> None:
    machine = machine_with(gpu_blocks=64, prefix_caching=False)
    state = machine.scheduler.state
    original = state.shareable_blocks

    def one_too_many(choice: object, tier: Tier) -> list[int]:
        shared = original(choice, tier)  # type: ignore[arg-type]
        donor = choice.request.choices[0]
        return donor.table.tolist()[: len(shared) + 1] if shared else shared

    state.shareable_blocks = one_too_many  # type: ignore[method-assign]
    machine.submit(submit("a", 10, 6, n=2))
    with pytest.raises(AssertionError):
        machine.run()


def test_requests_that_have_ended_are_gone_without_the_collector() -> None:
    """Of rings it finds the old ones once in tens of minutes, a hundred MiB of them in a soak."""
    machine = machine_with(max_batch_tokens=64)
    gc.disable()
    try:
        for i in range(6):
            machine.submit(submit(f"r{i}", 20, 10, n=1 + i % 2))
        machine.step()
        live = [weakref.ref(r) for r in machine.scheduler.state.requests.values()]
        machine.scheduler.abort("r3", None, machine.now)
        machine.run()
        assert len(live) == 6
        assert not any(request() for request in live)
    finally:
        gc.enable()
