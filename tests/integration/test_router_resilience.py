"""Backends that die, misbehave or are slow, and what clients see of it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio
import pytest

from neo_common.errors import ErrorDetails, Reason, ServiceError
from protos.neo.v1 import inference_pb2 as inference
from router.retry import MIN_RETRIES
from router.views import BackendState
from tests.support.fake_backend import FakeBackend, fake_backends
from tests.support.front import Front, deltas_left, details, front

UP = BackendState.UP
INTERNAL = ServiceError(Reason.INTERNAL_ERROR, "internal error")


def metric(ready: Front, name: str, **labels: str) -> float:
    return ready.router.collector.get_sample_value(name, labels) or 0.0


async def stream(ready: Front) -> tuple[int, str]:
    """How many pieces of the answer came, and how it ended: "OK" or CODE/REASON."""
    call = ready.inference.GenerateStream(inference.GenerateRequest(text="hi"), timeout=60)
    count = 0
    try:
        async for message in call:
            count += len(message.deltas)  # a busy router joins messages
    except grpc.aio.AioRpcError as error:
        return count, f"{error.code().name}/{ErrorDetails(error).reason}"
    return count, "OK"


async def test_an_engine_that_dies_under_load_fails_no_call_without_a_token() -> None:
    """Half of its streams have begun, the others have not: those are all answered elsewhere."""
    async with fake_backends(4) as backends, front(backends) as ready:
        victim = backends[0]
        begun = asyncio.Event()
        for backend in backends:
            backend.hold = begun
        started = [asyncio.create_task(stream(ready)) for _ in range(80)]
        await until_live(ready, backends, 80)
        gate = asyncio.Event()
        for backend in backends:
            backend.begin = gate
        silent = [asyncio.create_task(stream(ready)) for _ in range(80)]
        await until_live(ready, backends, 160)
        lost = victim.live
        assert lost > 20
        await victim.stop()
        gate.set()
        begun.set()
        ends = await asyncio.gather(*silent)
        assert ends == [(4, "OK")] * 80
        cut = [end for end in await asyncio.gather(*started) if end != (4, "OK")]
        assert 0 < len(cut) < lost
        assert set(cut) == {(1, "UNAVAILABLE/BACKEND_LOST")}
        assert metric(ready, "neo_router_retries_total") == lost - len(cut)


async def until_live(ready: Front, backends: list[FakeBackend], count: int) -> None:
    """Until that many calls are on the backends."""
    call = ready.operator.WatchBackends(ready.watch_request(10))
    async with asyncio.timeout(30):
        async for message in call:
            if (
                sum(backend.in_flight for backend in message.backends) == count
                and sum(backend.live for backend in backends) == count
            ):
                break
    call.cancel()


async def test_a_rolling_restart_fails_nothing() -> None:
    """Each in turn drains, stops and comes back at its address, while calls come all the time."""
    async with AsyncExitStack() as stack:
        backends = await stack.enter_async_context(fake_backends(3, tokens=3, delay=0.002))
        ready = await stack.enter_async_context(front(backends))
        done = asyncio.Event()
        ends: list[tuple[int, str]] = []

        async def client() -> None:
            while not done.is_set():
                ends.append(await stream(ready))

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for number, backend in enumerate(backends):
            states = [BackendState.DOWN if n == number else UP for n in range(3)]
            await backend.restart_begins()
            await ready.states(*states)
            await backend.start(backend.address)
            await ready.states(UP, UP, UP)
        done.set()
        await asyncio.gather(*clients)
        assert len(ends) > 50
        assert set(ends) == {(4, "OK")}


async def test_a_circuit_opens_and_one_probe_closes_it() -> None:
    """Its load stream goes on, but calls do not get through."""
    async with fake_backends(1) as (a,), front([a], max_attempts=1, breaker_failures=3) as ready:
        a.break_calls = True
        for _ in range(3):
            assert await stream(ready) == (0, "UNAVAILABLE/BACKEND_LOST")
        await ready.states(BackendState.DOWN)
        asked = len(a.requests)
        assert await stream(ready) == (0, "UNAVAILABLE/NO_BACKEND")
        assert len(a.requests) == asked, "an open circuit lets nothing through"
        a.break_calls = False
        await ready.states(UP)
        assert await stream(ready) == (4, "OK")


async def test_a_backend_that_fails_its_calls_is_left_out() -> None:
    async with fake_backends(3) as (a, b, c), front([a, b, c]) as ready:
        a.fail_with = INTERNAL
        ends = [await stream(ready) for _ in range(120)]
        assert {end for _, end in ends} == {"OK", "INTERNAL/INTERNAL_ERROR"}
        assert ends[-30:] == [(4, "OK")] * 30
        assert metric(ready, "neo_router_ejections_total", backend=a.address) == 1
        await ready.states(BackendState.SUSPECT, UP, UP)
        await b.stop()
        await c.stop()
        await ready.states(BackendState.SUSPECT, BackendState.DOWN, BackendState.DOWN)
        assert (await stream(ready))[1] == "INTERNAL/INTERNAL_ERROR", "better than nothing"


async def test_wrong_calls_do_not_make_an_outlier() -> None:
    async with fake_backends(2) as backends, front(backends) as ready:
        for backend in backends:
            backend.fail_with = ServiceError(Reason.NEVER_FITS, "too long")
        assert {await stream(ready) for _ in range(80)} == {(0, "INVALID_ARGUMENT/NEVER_FITS")}
        await ready.states(UP, UP)


async def test_a_slow_first_message_is_hedged() -> None:
    async with fake_backends(2) as backends, front(backends, hedge_after_ms=30.0) as ready:
        slow, quick = backends
        slow.begin = asyncio.Event()
        texts = await asyncio.gather(*(ready.text() for _ in range(6)))
        assert set(texts) == {"b0 b1 b2 "}
        hedged = metric(ready, "neo_router_hedges_total")
        # On a busy machine the quick one may be late, too: then the slow one does not win.
        assert hedged == len(slow.requests)
        assert 0 < metric(ready, "neo_router_hedges_won_total") <= hedged
        async with asyncio.timeout(10):
            await slow.cancelled.wait()
        await ready.states(UP, UP)
        assert len(quick.requests) == 6


async def test_a_hedged_call_ends_with_the_answer_of_who_is_left() -> None:
    async with fake_backends(2) as (a, b), front([a, b], hedge_after_ms=30.0) as ready:
        for backend in (a, b):
            backend.begin = asyncio.Event()
        call = ready.inference.Generate(inference.GenerateRequest(text="hi"))
        await until_live(ready, [a, b], 2)
        await a.stop()
        b.begin.set()  # type: ignore[union-attr]
        assert (await call).model == "b"


async def test_nothing_is_hedged_unless_told() -> None:
    async with fake_backends(2) as backends, front(backends) as ready:
        for backend in backends:
            backend.begin = asyncio.Event()
        call = ready.inference.GenerateStream(inference.GenerateRequest(text="hi"))
        await until_live(ready, backends, 1)
        assert metric(ready, "neo_router_hedges_total") == 0
        for backend in backends:
            backend.begin.set()  # type: ignore[union-attr]
        assert await deltas_left(call) == 4
        assert sum(len(backend.requests) for backend in backends) == 1


async def test_retries_end_with_the_budget() -> None:
    """All backends lose every call: what clients cause stays within the budget."""
    async with fake_backends(3) as backends, front(backends, breaker_failures=1000) as ready:
        for backend in backends:
            backend.break_calls = True
        calls = 60
        for _ in range(calls):
            code, reason = (await stream(ready))[1].split("/")
            assert (code, reason) == ("UNAVAILABLE", "BACKEND_LOST")
        sent = sum(len(backend.requests) for backend in backends)
        assert sent <= calls * 1.2 + MIN_RETRIES + 2, "not three times as many"
        assert metric(ready, "neo_router_retries_over_budget_total") > 0


async def test_a_call_for_a_session_stays_with_its_backend() -> None:
    async with fake_backends(4) as backends, front(backends, policy="session") as ready:

        async def served(session: str) -> str:
            call: Any = ready.inference.Generate(
                inference.GenerateRequest(text="hi"), metadata=(("x-neo-session-id", session),)
            )
            return str((await call).model)

        homes = {name: {await served(name) for _ in range(4)} for name in map(str, range(12))}
        assert all(len(home) == 1 for home in homes.values())
        assert len(set().union(*homes.values())) > 1


async def test_conversations_go_on_where_they_began() -> None:
    """`prefix`, by token ids; another model of the same router goes by its own policy."""
    async with fake_backends(4) as backends:
        for backend in backends:
            backend.models = ("m",)
        async with front(backends, policy="round-robin", model_policies=("m=prefix",)) as ready:

            async def served(ids: list[int]) -> str:
                request = inference.GenerateRequest(model="m")
                request.token_ids.ids.extend(ids)
                return str((await ready.inference.Generate(request)).model)

            for talk in range(8):
                said = [1000 * talk + 7] * 400
                first = await served(said)
                for _ in range(3):
                    said += [talk] * 150
                    assert await served(said) == first


async def test_a_refusal_by_who_is_draining_is_tried_elsewhere() -> None:
    """Before its snapshot says so; after the first refusal others are preferred."""
    async with fake_backends(2) as (a, b), front([a, b], load_interval_ms=400) as ready:
        a.fail_with = ServiceError(Reason.DRAINING, "draining", retry_after=1.0)
        texts = [await ready.text() for _ in range(10)]
        assert set(texts) == {"b0 b1 b2 "}
        assert len(a.requests) <= 4


async def test_details_of_lost_calls_do_not_name_addresses() -> None:
    async with fake_backends(1) as (a,), front([a]) as ready:
        a.break_calls = True
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.text()
        assert details(caught).reason == "BACKEND_LOST"
        assert a.address not in str(caught.value.details())


class Cutting(FakeBackend):
    """Ends each call as a server does that stops: cancelled, without a reason."""

    async def _begin(self, request: inference.GenerateRequest, context: Any) -> None:
        await context.abort(grpc.StatusCode.CANCELLED, "")


async def test_a_call_that_a_stopping_backend_cut_is_tried_elsewhere() -> None:
    cutting, whole = Cutting("a"), FakeBackend("b")
    for backend in (cutting, whole):
        await backend.start()
    async with front([cutting, whole], policy="round-robin") as ready:
        assert [await stream(ready) for _ in range(4)] == [(4, "OK")] * 4
    async with front([cutting]) as ready:
        assert await stream(ready) == (0, "UNAVAILABLE/BACKEND_LOST")
    for backend in (cutting, whole):
        await backend.stop()
