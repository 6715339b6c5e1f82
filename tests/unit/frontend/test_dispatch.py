"""Requests between the front end and an engine that does as it is told here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gpu_service.engine.messages import (
    Abort,
    ChoiceDelta,
    Command,
    Event,
    Output,
    Refusal,
    RequestUsage,
    SamplingSpec,
    Submit,
)
from gpu_service.frontend.dispatch import Dispatcher, LiveRequest, Update
from gpu_service.frontend.metrics import FrontendMetrics
from gpu_service.frontend.validate import ParsedRequest
from neo_common.errors import ServiceError

TOKENIZER = None  # token ids only: nobody asks it


class FakeEngine:
    """Takes commands, gives events; `full` makes it take nothing more."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.full = False

    async def send(self, command: Command) -> None:
        if self.full:
            await asyncio.Event().wait()
        self.commands.append(command)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self.events.get()) is not None:
            yield event


def parsed(request_id: str = "a", n: int = 1) -> ParsedRequest:
    submit = Submit(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingSpec(max_tokens=9, n=n),
        arrival=0.0,
    )
    return ParsedRequest(submit, (), False, True)


def dispatcher_on(engine: FakeEngine) -> Dispatcher:
    return Dispatcher(engine, TOKENIZER, FrontendMetrics("tiny"))  # type: ignore[arg-type]


def usage(gpu: int, host: int) -> RequestUsage:
    return RequestUsage(
        request_id="a", completion_tokens=gpu + host, gpu_tokens=gpu, host_tokens=host,
        demotions=1, promotions=2, recomputations=3, queue_seconds=0.5, ttft_seconds=0.75,
        cached_prompt_tokens=2, cached_host_tokens=1, prefix_hit_tokens=1,
    )  # fmt: skip


async def last_update(live: LiveRequest) -> Update:
    async for update in live:
        if update.usage is not None:
            return update
    raise AssertionError("it ended without usage")


@pytest.mark.parametrize("delivered", range(5))
@pytest.mark.parametrize(("gpu", "host"), [(4, 0), (0, 4), (2, 2), (3, 1), (1, 3)])
async def test_tokens_per_tier_add_up_to_what_was_delivered(
    gpu: int, host: int, delivered: int
) -> None:
    """Whatever the engine had decoded behind a stop string or an abort."""
    live = LiveRequest(parsed(), TOKENIZER)  # type: ignore[arg-type]
    live.take_in(ChoiceDelta("a", 0, list(range(delivered)), finish="aborted"))
    live.end(usage(gpu, host))
    told = (await last_update(live)).usage
    assert told is not None
    assert told.completion_tokens == delivered
    assert told.gpu_tokens + told.host_tokens == delivered
    assert told.gpu_tokens <= gpu
    assert told.host_tokens <= host


@pytest.mark.parametrize(
    ("reason", "field"),
    [("NEVER_FITS", "sampling.max_tokens"), ("INVALID_ARGUMENT", "prompt"), ("QUEUE_FULL", None)],
)
async def test_refusals_of_the_scheduler_name_their_field(reason: str, field: str | None) -> None:
    engine = FakeEngine()
    dispatcher = dispatcher_on(engine)
    pump = asyncio.create_task(dispatcher.run())
    refusal = Refusal(request_id="a", reason=reason, message="no", retry_after_seconds=2.0)
    async with dispatcher.open(parsed()) as live:
        engine.events.put_nowait(Output(refusals=[refusal]))
        with pytest.raises(ServiceError) as caught:
            await last_update(live)
    assert caught.value.field == field
    assert caught.value.retry_after == 2.0
    assert dispatcher.live == 0
    engine.events.put_nowait(None)
    await pump


async def test_a_request_that_is_left_is_aborted_and_forgotten() -> None:
    engine = FakeEngine()
    dispatcher = dispatcher_on(engine)
    async with dispatcher.open(parsed()):
        assert dispatcher.live == 1
    assert engine.commands[1:] == [Abort("a")]
    assert dispatcher.live == 0


async def test_a_handler_cancelled_twice_is_forgotten_too() -> None:
    """The engine is far behind, so that the abort waits when the server ends."""
    engine = FakeEngine()
    dispatcher = dispatcher_on(engine)

    submitted = asyncio.Event()

    async def handler() -> None:
        async with dispatcher.open(parsed()) as live:
            engine.full = True
            submitted.set()
            await last_update(live)

    task = asyncio.create_task(handler())
    await submitted.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=1)
    assert task.cancelled()
    assert dispatcher.live == 0
