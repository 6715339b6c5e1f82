"""The router's policies in simulation: what the figures in docs/perf-log.md rest on."""

from __future__ import annotations

import pytest

from benchmarks.router_sim import multi_turn, queues
from benchmarks.router_sim.engines import Clock, Job, Machine, SimulatedEngine
from router.config import RouterConfig
from router.policies import POLICIES

SMALL_FLEET = queues.EIGHT[:1] + queues.EIGHT[-1:]


def served(policy: str, load: float = 0.9, count: int = 3000, seed: int = 5) -> list[Job]:
    jobs = queues.workload(count, load * queues.capacity(queues.EIGHT), seed)
    queues.routed(queues.EIGHT, jobs, POLICIES[policy])
    return jobs


def test_an_engine_starts_in_order_and_within_its_kv() -> None:
    """Worked out by hand: 1000 tokens/s, KV for two of these requests."""
    clock, ended = Clock(), []
    machine = Machine(prefill_tokens_per_second=1000, token_seconds=0.1, kv_tokens=2200)
    engine = SimulatedEngine("e", machine, clock, ended.append)
    jobs = [Job(n, 0.0, 1000, 10) for n in range(3)]
    for job in jobs:
        engine.submit(job)
    clock.run(lambda: len(ended) == 3)
    assert [job.started for job in jobs] == [0.0, 1.0, 2.0], "the third waits for KV until 2.0"
    assert [job.ended for job in ended] == pytest.approx([2.0, 3.0, 4.0])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_served_once_and_in_time(policy: str) -> None:
    jobs = queues.workload(300, 0.7 * queues.capacity(SMALL_FLEET), 1)
    engines = queues.routed(SMALL_FLEET, jobs, POLICIES[policy], routers=2)
    assert all(job.arrival <= job.started < job.ended for job in jobs)
    assert all(not engine.running and not engine.used_tokens for engine in engines)


def test_the_default_policy_waits_least_and_nearly_as_one_queue() -> None:
    jobs = queues.workload(3000, 0.9 * queues.capacity(queues.EIGHT), 5)
    queues.single_queue(queues.EIGHT, jobs)
    best = queues.percentile(jobs, 0.99)
    waits = {
        policy: queues.percentile(served(policy), 0.99)
        for policy in ("predicted-wait", "kv-pressure", "power-of-two", "round-robin")
    }
    assert min(waits, key=lambda policy: waits[policy]) == RouterConfig.policy
    assert waits[RouterConfig.policy] <= 1.3 * best


def test_conversations_find_nine_tenths_of_what_one_engine_would_have() -> None:
    workload = multi_turn.Conversations(count=150)
    machines = (queues.MEDIUM,) * 4
    whole = multi_turn.run(
        workload, [multi_turn.pooled(machines)], 4 * 60_000, POLICIES["round-robin"]
    )
    found = {
        policy: multi_turn.run(workload, machines, 60_000, POLICIES[policy])
        for policy in ("prefix", "predicted-wait")
    }
    assert whole.hit_rate > 0.8
    assert found["prefix"].hit_rate >= 0.9 * whole.hit_rate
    assert max(found["prefix"].shares) < 0.35, "and not by sending all to one"
    assert found["predicted-wait"].hit_rate < 0.75 * whole.hit_rate, "which does not come by itself"
