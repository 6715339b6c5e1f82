"""The driver of `neo bench`, on callers without a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from neo_client.bench.drive import Caller, Driver, Pace
from neo_client.bench.load import Session
from neo_client.bench.own import OwnLoad
from neo_client.bench.progress import line
from neo_client.bench.prompts import PromptMaker
from neo_client.bench.result import timeline
from neo_client.options import Prompt
from neo_client.workloads import Lengths
from neo_common.errors import Reason, ServiceError
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

PROMPTS = PromptMaker(1000, [], 4, 0)


@dataclass
class FakeServer:
    """Answers with so many tokens, `gap` seconds before each."""

    gap: float = 0.0
    fail: frozenset[int] = frozenset()
    """Calls that fail, by number."""
    prompts: list[Prompt] = field(default_factory=list)
    live: int = 0
    most: int = 0

    async def __call__(
        self, prompt: Prompt, output_tokens: int
    ) -> AsyncGenerator[inference.GenerateStreamResponse]:
        number = len(self.prompts)
        self.prompts.append(list(prompt))  # type: ignore[arg-type]
        self.live += 1
        self.most = max(self.most, self.live)
        try:
            if number in self.fail:
                status: Any = ServiceError(Reason.QUEUE_FULL, "full").to_status()
                empty = grpc.aio.Metadata()
                trailing = grpc.aio.Metadata(*status.trailing_metadata)
                raise grpc.aio.AioRpcError(status.code, empty, trailing, status.details)
            for token in range(output_tokens):
                await asyncio.sleep(self.gap)
                delta = inference.Choice(token_ids=[token])
                yield inference.GenerateStreamResponse(deltas=[delta])
            usage = types.Usage(prompt_tokens=len(prompt), completion_tokens=output_tokens)
            yield inference.GenerateStreamResponse(usage=usage)
        finally:
            self.live -= 1


def sessions(count: int, dues: Sequence[float] | None = None, **fields: Any) -> list[Session]:
    turns = fields.pop("turns", (Lengths(6, 2),))
    return [
        Session(number, None if dues is None else dues[number], turns, **fields)
        for number in range(count)
    ]


async def drive(server: Caller, pace: Pace, made: list[Session]) -> Driver:
    driver = Driver(server, PROMPTS, pace)
    async with asyncio.timeout(60):
        await driver.run(made)
    assert driver.live == 0
    return driver


async def test_a_server_that_stalls_shows_in_the_latency_of_all_that_were_due() -> None:
    """Coordinated omission: all are due at once, one at a time is let through. Counted from when
    they were sent, each would have been quick."""
    server = FakeServer(gap=0.02)
    driver = await drive(server, Pace(True, max_in_flight=1), sessions(8, [0.0] * 8))
    assert server.most == 1
    assert driver.held_back == 7
    for place, sample in enumerate(driver.samples):
        assert sample.ttft is not None
        assert sample.sent_ttft is not None
        assert sample.due == 0
        assert sample.ttft >= place * 0.04 + 0.018
        assert sample.ttft == pytest.approx(sample.delay + sample.sent_ttft)
    assert driver.samples[-1].delay >= 7 * 0.036
    own = OwnLoad().figures(driver.held_back, [])
    assert "7 requests were held back" in own["limits"][0]


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    server = FakeServer(gap=0.2)
    driver = await drive(server, Pace(True), sessions(6, [0.02 * n for n in range(6)]))
    assert server.most == 6
    assert driver.held_back == 0
    assert all(sample.sent >= sample.due for sample in driver.samples)


async def test_a_closed_loop_keeps_its_workers_busy_and_no_more() -> None:
    server = FakeServer(gap=0.002)
    driver = await drive(server, Pace(False, concurrency=3), sessions(12))
    assert server.most == 3
    assert len(driver.samples) == 12
    assert max(sample.delay for sample in driver.samples) < 0.05


async def test_a_closed_loop_ends_by_time() -> None:
    endless = [each for _ in range(1000) for each in sessions(100)]
    started = time.monotonic()
    driver = await drive(FakeServer(gap=0.01), Pace(False, concurrency=2, seconds=0.3), endless)
    assert 4 < len(driver.samples) < 200
    assert time.monotonic() - started > 0.3


async def test_turns_stand_behind_what_was_said_and_prefixes_are_shared() -> None:
    server = FakeServer()
    turns = (Lengths(6, 2), Lengths(3, 1))
    driver = await drive(server, Pace(False, concurrency=1), sessions(2, prefix=0, turns=turns))
    first, second, other, _ = server.prompts
    prefix = PROMPTS.prefix(0)
    assert first == prefix + PROMPTS.turn(0, 0, 6)
    assert second == [*first, 0, 1, *PROMPTS.turn(0, 1, 3)]
    assert other[:4] == prefix
    assert other[4:] == PROMPTS.turn(1, 0, 6)
    assert [(s.session, s.turn, s.prompt_tokens) for s in driver.samples] == [
        (0, 0, 10), (0, 1, 15), (1, 0, 10), (1, 1, 15),
    ]  # fmt: skip


async def test_thinking_is_not_waiting() -> None:
    turns = (Lengths(2, 1),) * 3
    pace = Pace(False, concurrency=1, think_seconds=0.1)
    driver = await drive(FakeServer(), pace, sessions(1, turns=turns))
    a, b, c = driver.samples
    assert b.due == pytest.approx(a.end + 0.1, abs=0.02)
    assert c.sent >= b.end + 0.1
    assert max(s.ttft or 0 for s in driver.samples) < 0.08


async def test_failures_are_samples_with_their_reason_and_end_their_session() -> None:
    server = FakeServer(fail=frozenset({1}))
    turns = (Lengths(2, 1),) * 3
    driver = await drive(server, Pace(False, concurrency=1), sessions(2, turns=turns))
    assert [(s.session, s.turn, s.code, s.reason) for s in driver.samples] == [
        (0, 0, "OK", ""), (0, 1, "RESOURCE_EXHAUSTED", "QUEUE_FULL"),
        (1, 0, "OK", ""), (1, 1, "OK", ""), (1, 2, "OK", ""),
    ]  # fmt: skip
    assert driver.dropped_turns == 1


async def test_the_first_sessions_warm_up() -> None:
    driver = await drive(FakeServer(), Pace(False, warmup=2), sessions(5))
    assert [s.warmup for s in sorted(driver.samples, key=lambda s: s.session)] == [
        True, True, False, False, False,
    ]  # fmt: skip


async def test_what_is_cancelled_leaves_what_had_ended() -> None:
    server = FakeServer(gap=0.05)
    driver = Driver(server, PROMPTS, Pace(True))
    work = asyncio.create_task(driver.run(sessions(6, [0.0, 0.0, 0.0, 0.0, 0.0, 30.0])))
    async with asyncio.timeout(20):
        while len(driver.samples) < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert len(driver.samples) == 5
    assert server.live == 0


async def test_a_bug_in_a_caller_is_not_a_failed_request() -> None:
    async def broken(prompt: Prompt, output_tokens: int) -> AsyncGenerator[Any]:
        raise ZeroDivisionError
        yield

    with pytest.raises(ExceptionGroup):
        await drive(broken, Pace(False), sessions(2))


async def test_progress_says_how_far_it_is() -> None:
    driver = await drive(FakeServer(fail=frozenset({0})), Pace(False, concurrency=1), sessions(3))
    shown = line(driver, OwnLoad(), 3)
    assert "3 of 3 ended" in shown
    assert "1 failed" in shown
    assert "TTFT p50/p99" in shown


async def test_every_token_and_request_is_on_the_timeline() -> None:
    driver = await drive(FakeServer(gap=0.01), Pace(False, concurrency=2), sessions(20))
    found = timeline(driver.samples, driver.ticks)
    assert sum(found["tokens"]) == 40
    assert sum(found["due"]) == sum(found["ended"]) == 20
    assert max(found["under_way"]) <= 2


async def test_a_generator_at_its_limit_says_so() -> None:
    own = OwnLoad()
    watching = asyncio.create_task(own.watch())
    until = time.perf_counter() + 0.6
    while time.perf_counter() < until:
        busy = time.perf_counter() + 0.06
        while time.perf_counter() < busy:
            sum(range(1000))
        await asyncio.sleep(0)
    watching.cancel()
    figures = own.figures(0, [0.001] * 10)
    # Its share of a core depends on who else wants it; its lateness does not.
    assert any("late" in limit for limit in figures["limits"])
    assert figures["loop_core_share"] > 0.1
    assert OwnLoad().figures(0, [])["limits"] == []
