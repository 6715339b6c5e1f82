"""Which tier a request is on: placement, demotion, promotion."""

from __future__ import annotations

import dataclasses

import pytest

from gpu_service.scheduling.plan import Mode, Tier
from tests.support.fake_model import machine_with, submit, tiers


@pytest.mark.parametrize(
    ("offload", "placement", "tier"),
    [
        ("never", "auto", Tier.GPU),
        ("never", "cpu_preferred", Tier.GPU),
        ("auto", "auto", Tier.GPU),
        ("auto", "gpu_only", Tier.GPU),
        ("auto", "cpu_preferred", Tier.HOST),
        ("always", "auto", Tier.HOST),
        ("always", "gpu_only", Tier.GPU),
    ],
)
def test_placement_of_a_lone_request(offload: str, placement: str, tier: Tier) -> None:
    machine = machine_with(offload=offload)
    machine.submit(submit("a", 8, 8, placement=placement))
    machine.step()
    assert tiers(machine) == {"a": tier}


def test_auto_goes_to_the_host_when_the_gpu_is_full() -> None:
    machine = machine_with(max_batch_tokens=64)
    machine.submit(submit("first", 30, 30))
    machine.submit(submit("second", 30, 30))
    machine.step()
    assert tiers(machine) == {"first": Tier.GPU, "second": Tier.HOST}


def test_a_tpot_that_the_host_is_not_known_to_meet_keeps_a_request_off_it() -> None:
    machine = machine_with(offload="always")
    targeted = submit("a", 8, 8)
    targeted = type(targeted)(**{**_fields(targeted), "tpot_ms": 20.0})
    machine.submit(targeted)
    machine.step()
    assert tiers(machine)["a"] is Tier.GPU
    machine.scheduler.observe_host_sweep(10.0, Mode.INLINE)
    machine.submit(type(targeted)(**{**_fields(targeted), "request_id": "b"}))
    machine.step()
    assert tiers(machine)["b"] is Tier.HOST


def _fields(struct: object) -> dict[str, object]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_gpu_only_is_recomputed_where_others_are_demoted() -> None:
    machine = machine_with(gpu_blocks=24)
    machine.submit(submit("old", 4, 70, placement="gpu_only"))
    machine.submit(submit("new", 4, 70, placement="gpu_only", arrival=1.0))
    machine.run()
    assert machine.usages["new"].recomputations >= 1
    assert machine.usages["old"].recomputations == 0
    assert not any(plan.migrations for plan in machine.plans)


def test_gpu_pressure_demotes_the_newest_and_loses_no_work() -> None:
    machine = machine_with(gpu_blocks=24)
    for i in range(2):
        machine.submit(submit(f"r{i}", 4, 70, arrival=float(i)))
    machine.run()
    assert machine.usages["r1"].demotions >= 1
    assert machine.usages["r0"].demotions == 0
    assert machine.scheduler.state.recomputations == 0


def test_the_oldest_host_request_is_promoted_when_the_gpu_has_room() -> None:
    machine = machine_with(max_batch_tokens=64)
    machine.submit(submit("gpu", 40, 4))
    machine.submit(submit("h1", 20, 40, arrival=1.0))
    machine.submit(submit("h2", 20, 40, arrival=2.0))
    machine.step()
    assert tiers(machine) == {"gpu": Tier.GPU, "h1": Tier.HOST, "h2": Tier.HOST}
    while tiers(machine).get("h1") is Tier.HOST:
        machine.step()
    assert tiers(machine) == {"h1": Tier.GPU, "h2": Tier.HOST}


def test_cpu_preferred_is_not_promoted() -> None:
    machine = machine_with()
    machine.submit(submit("a", 8, 20, placement="cpu_preferred"))
    machine.run()
    assert machine.usages["a"].host_tokens == 20


DEFERRED = {"cohorts": 3, "cohort_rows": 4, "host_prefill": False, "copies_beside": True}


def test_a_move_without_anything_to_copy_keeps_nobody_waiting() -> None:
    """A prompt of one token whose only row has come to nothing decodes, and has no KV yet."""
    machine = machine_with(**DEFERRED)
    machine.submit(submit("a", 1, 4, placement="cpu_preferred"))
    machine.step(lambda plan, result: dataclasses.replace(result, tokens={}, void=frozenset({0})))
    machine.run()
    machine.check_empty()
    assert machine.usages["a"].host_tokens > 0


def test_blocks_that_are_left_wait_for_no_sweep() -> None:
    """Should nothing be launched after all, the next plan is decided with them."""
    machine = machine_with(**DEFERRED)
    machine.submit(submit("a", 8, 9, placement="cpu_preferred"))
    machine.step()
    state = machine.scheduler.state
    assert machine.scheduler.schedule(machine.now).migrations[0].beside
    assert state.pools[Tier.GPU].used_count > 0
    machine.scheduler.schedule(machine.now)
    assert state.pools[Tier.GPU].used_count == 0
    state.check_integrity()


def test_a_prompt_for_the_host_has_staging_though_another_heads_the_queue() -> None:
    """Whoever heads it waits for the GPU tier, and rows that stream would take all of staging."""
    machine = machine_with(
        gpu_blocks=24, host_blocks=200, cohorts=3, cohort_rows=4, streamed_blocks=10,
        staged_prompts=True, copies_beside=True, max_batch_tokens=64,
    )  # fmt: skip
    machine.submit(submit("old", 40, 40, placement="gpu_only"))
    for i in range(4):
        machine.submit(submit(f"host{i}", 8, 30, placement="cpu_preferred"))
    for _ in range(12):
        machine.step()
    assert any(batch.streamed for plan in machine.plans for batch in plan.batches)
    machine.submit(submit("head", 60, 2, placement="gpu_only"))
    machine.submit(submit("new", 32, 4, placement="cpu_preferred"))
    for _ in range(6):
        machine.step()
    assert "head" not in tiers(machine)
    assert tiers(machine)["new"] is Tier.HOST
    assert "new" in machine.first_token
