"""Liveness and the host tier, as a gpu_service's front end judges them."""

from __future__ import annotations

import pytest

from gpu_service.engine.messages import Load, Output, TierLoad
from gpu_service.frontend.dispatch import Dispatcher
from gpu_service.frontend.health import HealthReporter
from gpu_service.frontend.metrics import FrontendMetrics
from neo_common.grpc.health import HOST_TIER, LIVENESS, Health
from tests.unit.frontend.test_dispatch import FakeEngine, parsed

STALL_SECONDS = 100.0


class Answers(Health):
    """Keeps what was said last."""

    def __init__(self) -> None:
        super().__init__([])
        self.said: dict[str, bool] = {}

    async def set(self, name: str, serving: bool) -> None:
        self.said[name] = serving
        await super().set(name, serving)


class Bench:
    def __init__(self, stall_seconds: float = STALL_SECONDS) -> None:
        self.now = 0.0
        self.engine = FakeEngine()
        self.dispatcher = Dispatcher(
            self.engine,
            None,
            FrontendMetrics("tiny"),
            clock=lambda: self.now,  # type: ignore[arg-type]
        )
        self.health = Answers()
        self.reporter = HealthReporter(self.health, self.dispatcher, stall_seconds)

    async def run_out(self, output: Output) -> None:
        """The engine says this and ends; what is live stays so until it is left."""
        self.engine.events.put_nowait(output)
        self.engine.events.put_nowait(None)
        await self.dispatcher.run()

    async def hear(self, host_tier: str) -> None:
        """The engine says something, and health is told."""
        tier = TierLoad(1, 1, 0, 0)
        load = Load(
            host_tier_state=host_tier, gpu=tier, host=tier, waiting_requests=0,
            waiting_prompt_tokens=0, block_tokens=16, demotions_total=0, promotions_total=0,
            recomputations_total=0, iterations_total=0, iteration_seconds=0.0,
            output_tokens_per_second=0.0,
        )  # fmt: skip
        await self.run_out(Output(load=load))
        await self.reporter.report()


async def test_the_host_tier_has_a_name_of_its_own() -> None:
    bench = Bench()
    await bench.reporter.report()
    assert HOST_TIER not in bench.health.said
    for state, up in (("up", True), ("degraded", False), ("lost", False), ("up", True)):
        await bench.hear(state)
        assert bench.health.said[HOST_TIER] is up


async def test_without_a_host_tier_its_name_is_unknown() -> None:
    bench = Bench()
    await bench.hear("off")
    assert HOST_TIER not in bench.health.said


async def test_an_engine_that_owes_an_answer_for_too_long_is_not_live() -> None:
    bench = Bench()
    bench.now = 1000.0  # idle for long: nothing is owed
    await bench.reporter.report()
    async with bench.dispatcher.open(parsed()):
        bench.now += STALL_SECONDS
        await bench.reporter.report()
        assert LIVENESS not in bench.health.said
        bench.now += 1
        await bench.reporter.report()
        assert bench.health.said[LIVENESS] is False
    await bench.reporter.report()
    assert bench.health.said[LIVENESS] is True


@pytest.mark.parametrize("stall_seconds", [0.0, STALL_SECONDS])
async def test_each_word_of_the_engine_counts(stall_seconds: float) -> None:
    bench = Bench(stall_seconds)
    async with bench.dispatcher.open(parsed()):
        for _ in range(3):
            bench.now += 0.9 * STALL_SECONDS if stall_seconds else 1e6
            await bench.reporter.report()
            assert LIVENESS not in bench.health.said
            if stall_seconds:
                await bench.run_out(Output())
