"""How large a chunk the next iteration takes."""

from __future__ import annotations

import pytest

from gpu_service.scheduling.batching import BatchBuilder
from gpu_service.scheduling.budget import bound_chunks
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import Tier
from gpu_service.scheduling.scheduler import Scheduler
from tests.support.fake_model import Machine, expected_output, limits, submit

# Rows -> ms, as an H100 with Llama-3-8B: a pass over the weights, then arithmetic.
DECODE = {1: 6.2, 16: 6.3, 32: 6.4, 64: 6.5, 256: 8.0}
MIXED = {64: 6.6, 128: 7.0, 256: 8.4, 512: 13.5, 1024: 26.0, 4096: 95.0}


def costs() -> SweepCosts:
    return SweepCosts(DECODE, MIXED, context_ms=5e-5)


def scheduler(**changes: object) -> Scheduler:
    bounds = limits(
        **{
            "gpu_blocks": 400,
            "host_blocks": 0,
            "max_batch_tokens": 4096,
            "max_running": 256,
            "max_context_tokens": 4000,
            **changes,
        }
    )
    return Scheduler(bounds, costs())


def budget(made: Scheduler) -> int:
    """Beside nothing."""
    batch = BatchBuilder(made.limits.max_batch_tokens, 1, made.limits)
    bound_chunks(made.state, made.costs, batch)
    return batch.budget


def test_without_costs_the_limit_is_taken() -> None:
    made = Scheduler(limits(max_batch_tokens=24))
    assert budget(made) == 24


def test_nothing_to_prefill_takes_the_limit() -> None:
    made = scheduler()
    assert budget(made) == 4096


def test_an_empty_machine_takes_the_cheapest_size_a_token() -> None:
    made = scheduler(gpu_blocks=4000)
    for i in range(40):
        made.submit(submit(f"r{i}", 200, 20), 0.0)
    assert budget(made) == 4096


def test_one_prompt_beside_many_decode_rows_hides_under_the_weights() -> None:
    """Blocks for 20 prompts: the 21st is prefilled in chunks that cost little more than the decode
    sweep."""
    made = scheduler(gpu_blocks=20 * 102)
    machine = Machine(made)
    requests = [submit(f"r{i}", 400, 4 + i) for i in range(40)]
    for request in requests:
        machine.submit(request)
    machine.run()
    batches = [batch for plan in machine.plans for batch in plan.batches]
    beside = [b.tokens for b in batches if b.prefill and len(b.gpu_decode) >= 16]
    assert beside
    assert max(beside) <= 256
    assert max(batch.tokens for batch in batches) > 512, "the first prompts come in large chunks"
    for request in requests:
        assert machine.outputs[request.request_id, 0] == expected_output(request)


def test_a_short_remainder_does_not_pay_for_padding() -> None:
    made = scheduler(gpu_blocks=4000)
    made.submit(submit("r", 70, 20), 0.0)
    assert budget(made) == 128


@pytest.mark.parametrize("asymmetric", [False, True])
def test_host_rows_that_are_waited_for_leave_the_chunk_its_room(asymmetric: bool) -> None:
    """More of them than the cheapest size has rows: prompts go on beside them all the same."""
    made = scheduler(gpu_blocks=60, host_blocks=20_000, asymmetric=asymmetric, offload="auto")
    machine = Machine(made)
    for i in range(150):
        machine.submit(submit(f"h{i}", 2, 300, placement="cpu_preferred"))
    for _ in range(5):
        machine.step()
    machine.submit(submit("new", 120, 4, placement="gpu_only"))
    before = len(machine.plans)
    for _ in range(4):
        machine.step()
    assert "new" in machine.first_token
    for plan in machine.plans[before:]:
        assert sum(len(batch.host_decode) for batch in plan.batches) >= 149


def test_a_chunk_leaves_room_for_all_that_is_padded_beside_it() -> None:
    """Streamed rows and the host's places too, and for prompts of either tier: more rows than were
    captured take the device several times as long."""
    places, most = 16, 512
    known = SweepCosts(DECODE, MIXED, 5e-5, beside_chunks=(0, 8, 64))
    bounds = limits(
        gpu_blocks=40, host_blocks=4000, max_batch_tokens=4096, max_running=256, offload="auto",
        max_context_tokens=2000, cohorts=5, cohort_rows=places, streamed_blocks=80, block_tokens=16,
        host_prefill=True, staged_prompts=True, captured_rows=most, copies_beside=True,
    )  # fmt: skip
    machine = Machine(Scheduler(bounds, known))
    for i in range(30):
        machine.submit(submit(f"r{i}", 300 + 17 * i, 12))
    machine.run()
    batches = [b for plan in machine.plans for b in plan.batches if b.prefill]
    assert any(b.streamed and not b.gpu_decode for b in batches)
    assert any(chunk.tier is Tier.HOST for b in batches for chunk in b.prefill)
    assert any(chunk.tier is Tier.GPU for b in batches for chunk in b.prefill)
    for b in batches:
        decode = known.padded_decode(len(b.gpu_decode) + len(b.streamed))
        chunks = sum(len(chunk.token_ids) for chunk in b.prefill)
        # Before anybody is on the host tier, larger ones pay.
        if b.host_decode or b.streamed:
            assert decode + chunks + places <= most


def test_captured_sweeps_hold_so_many_prompts() -> None:
    bounds = limits(
        gpu_blocks=900, host_blocks=400, max_batch_tokens=512, max_running=256, offload="auto",
        max_context_tokens=400, cohorts=5, cohort_rows=16, captured_rows=512, captured_chunks=16,
    )  # fmt: skip
    machine = Machine(Scheduler(bounds, costs()))
    machine.submit(submit("host", 3, 60, placement="cpu_preferred"))
    machine.step()
    for i in range(40):
        machine.submit(submit(f"r{i}", 5, 2, placement="gpu_only"))
    machine.run()
    prompts = [len(batch.prefill) for plan in machine.plans for batch in plan.batches]
    assert max(prompts) == 16
    assert prompts.count(16) == 2


def test_where_captured_sweeps_have_no_room_chunks_stay_small() -> None:
    """One row more or less must not make a chunk of all that waits."""
    known = SweepCosts(DECODE, MIXED, 5e-5, beside_chunks=(0, 256, 500))
    bounds = limits(
        gpu_blocks=9000, host_blocks=400, max_batch_tokens=4096, max_running=600, offload="auto",
        max_context_tokens=4000, cohorts=5, cohort_rows=16, captured_rows=512,
    )  # fmt: skip
    chunks = []
    for decoding in (250, 260):
        made = Scheduler(bounds, known)
        machine = Machine(made)
        machine.submit(submit("host", 3, 300, placement="cpu_preferred"))
        for i in range(decoding):
            machine.submit(submit(f"d{i}", 2, 300, placement="gpu_only"))
        for _ in range(8):
            machine.step()
        assert made.state.running_on(Tier.HOST)
        for i in range(12):
            machine.submit(submit(f"r{i}", 1500, 20, placement="gpu_only"))
        machine.step()
        chunks.append(sum(len(c.token_ids) for b in machine.plans[-1].batches for c in b.prefill))
    assert 0 < chunks[0] <= 512 - 256 - 16
    assert 0 < chunks[1] <= 1024 - 500 - 16


def test_decode_rows_are_padded_beside_chunks() -> None:
    known = SweepCosts(DECODE, MIXED, 5e-5, beside_chunks=(0, 8, 24))
    assert [known.padded_decode(rows) for rows in (0, 1, 8, 9, 24, 25)] == [0, 8, 8, 24, 24, 25]


def test_costs_learn_from_sweeps() -> None:
    known = costs()
    for _ in range(400):
        known.observe(30, False, 20_000, DECODE[32] + 20_000 * 8e-5)
        known.observe(200, True, 20_000, 10.0 + 20_000 * 8e-5)
        known.observe(5000, True, 0, 100.0)
        known.observe(400, True, 0, 1e6)
    took = DECODE[32] + 20_000 * 8e-5
    assert known.decode_ms(30, 20_000) == pytest.approx(took, rel=1e-3)
    mixed = known.mixed_ms(250, 20_000)
    assert mixed == pytest.approx(10.0 + 20_000 * 8e-5, rel=1e-2)
    # What nobody has seen is off by as much as what was; pauses and larger sweeps tell nothing.
    assert 1 < known.mixed_ms(512, 0) / MIXED[512] < 1.4


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_costs_that_were_wrong_come_right(factor: float) -> None:
    """All of them, if they were wrong by the same factor."""
    known = SweepCosts(
        {rows: factor * ms for rows, ms in DECODE.items()},
        {rows: factor * ms for rows, ms in MIXED.items()},
        context_ms=factor * 5e-5,
    )
    for _ in range(300):
        known.observe(30, False, 20_000, DECODE[32] + 20_000 * 5e-5)
        known.observe(200, True, 20_000, MIXED[256] + 20_000 * 5e-5)
    for rows in (1, 32, 200):
        exact = costs().decode_ms(rows, 20_000)
        assert known.decode_ms(rows, 20_000) == pytest.approx(exact, rel=0.02)
    for rows in (64, 256, 4096):
        assert known.mixed_ms(rows, 0) == pytest.approx(MIXED[rows], rel=0.15)
