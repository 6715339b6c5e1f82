"""What becomes of requests while the host tier is away, and after its lease."""

from __future__ import annotations

from gpu_service.offload.host_tier import HostTierState
from gpu_service.scheduling.decision import Decision
from tests.support.fake_model import Machine, machine_with, submit


def away(machine: Machine, state: HostTierState, seconds: float) -> None:
    machine.host = state
    end = machine.now + seconds
    while machine.now < end:
        machine.step()
        machine.now += 1.0


def host_and_gpu() -> Machine:
    machine = machine_with(lease_seconds=30.0)
    machine.submit(submit("host", 8, 40, placement="cpu_preferred"))
    machine.submit(submit("gpu", 8, 40, placement="gpu_only"))
    machine.step()
    machine.step()
    return machine


def test_host_requests_wait_out_an_outage_and_others_go_on() -> None:
    machine = host_and_gpu()
    before = list(machine.outputs["host", 0])
    away(machine, HostTierState.DEGRADED, 20.0)
    assert machine.outputs["host", 0] == before
    assert len(machine.outputs["gpu", 0]) > len(before)
    assert machine.scheduler.stalled_choices == 1
    machine.host = HostTierState.UP
    machine.run()
    assert machine.usages["host"].recomputations == 0
    assert len(machine.outputs["host", 0]) == 40


def test_new_requests_start_on_the_gpu_while_others_wait_for_the_host() -> None:
    """With `offload_mode: auto` it is decided that the host tier holds nothing while it is away:
    whoever is to leave it then cannot, and must not keep the GPU's blocks from others."""
    machine = host_and_gpu()
    machine.scheduler.state.decision = Decision(why="there is no host tier now")
    machine.submit(submit("new", 8, 3, placement="gpu_only"))
    away(machine, HostTierState.DEGRADED, 5.0)
    assert len(machine.outputs["new", 0]) == 3


def test_a_host_tier_lost_by_its_lease_ends_its_requests() -> None:
    machine = host_and_gpu()
    # The scheduler's clock says less than the lease: the tier's own is what counts.
    away(machine, HostTierState.DEGRADED, 25.0)
    away(machine, HostTierState.EXPIRED, 2.0)
    assert machine.refused == {"host": "HOST_TIER_LOST"}
    machine.run()
    assert len(machine.outputs["gpu", 0]) == 40
    machine.check_empty()


def test_kv_lost_within_the_lease_is_computed_again() -> None:
    """However long the tier seems to have been away here."""
    machine = host_and_gpu()
    away(machine, HostTierState.DEGRADED, 32.0)
    away(machine, HostTierState.LOST, 3.0)
    machine.host = HostTierState.UP
    machine.run()
    assert machine.usages["host"].recomputations == 1
    assert len(machine.outputs["host", 0]) == 40
    assert not machine.refused


def test_requests_that_can_only_be_on_a_lost_host_tier_end_after_the_lease() -> None:
    machine = machine_with(offload="always", lease_seconds=30.0)
    machine.submit(submit("a", 8, 40))
    machine.step()
    away(machine, HostTierState.LOST, 20.0)
    assert not machine.refused
    away(machine, HostTierState.LOST, 20.0)
    assert machine.refused == {"a": "HOST_TIER_LOST"}
    machine.check_empty()
