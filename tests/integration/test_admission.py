"""A router that makes callers wait, or refuses them, between real clients and scripted backends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from neo_common.errors import ErrorDetails, Reason, ServiceError
from neo_common.grpc.principal import PRIORITY_KEY, TENANT_KEY, Principal, Role
from protos.compat import kserve_pb2 as kserve
from protos.compat import kserve_pb2_grpc
from protos.neo.v1 import inference_pb2 as inference
from router.admission.cost import Cost
from router.app import Router
from tests.support.fake_backend import FakeBackend, fake_backends
from tests.support.front import Front, details, front, rest
from tests.support.http import COMPLETION, events, http_front

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


class TenantsFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def __str__(self) -> str:
        return str(self.path)


@pytest.fixture
def tenants(tmp_path: Path) -> TenantsFile:
    return TenantsFile(tmp_path / "tenants.yaml")


def stream(ready: Front, tenant: str = "", priority: int = 0, **named: Any) -> Any:
    request = inference.GenerateRequest(text="hi", request_id=named.pop("request_id", ""))
    metadata = ((TENANT_KEY, tenant), (PRIORITY_KEY, str(priority)))
    return ready.inference.GenerateStream(request, metadata=metadata, **named)


async def until_waiting(router: Router, count: int) -> None:
    """Looks whenever a backend reports, every 20 ms."""
    news = asyncio.Event()
    router.registry.on_change(news.set)
    async with asyncio.timeout(20):
        while router.admission.waiting != count:
            news.clear()
            await news.wait()


async def held(ready: Front, backend: FakeBackend) -> Any:
    """A call that runs until `backend.hold` is set."""
    backend.hold = backend.hold or asyncio.Event()
    call = stream(ready, request_id="first")
    await call.read()
    return call


def order(backend: FakeBackend) -> list[str]:
    return [request.request_id for request in backend.requests]


async def test_callers_wait_their_turn(tenants: TenantsFile) -> None:
    tenants.write("max_running: 1")
    async with fake_backends(1) as (a,), front([a], tenants=str(tenants)) as ready:
        first = await held(ready, a)
        calls = []
        for number, (name, priority) in enumerate([("x", 0), ("x", 0), ("y", 0), ("x", 9)]):
            request_id = f"{name}{priority}"
            calls.append(asyncio.create_task(
                _texts(stream(ready, name, priority, request_id=request_id))
            ))  # fmt: skip
            await until_waiting(ready.router, number + 1)
        assert order(a) == ["first"]
        assert a.hold is not None
        a.hold.set()
        assert await asyncio.gather(*calls) == ["a0 a1 a2 "] * 4
        assert order(a)[:2] == ["first", "x9"]
        assert sorted(order(a)[2:4]) == ["x0", "y0"], "tenants take turns"
        assert order(a)[4:] == ["x0"]
        await _texts(first)
        assert ready.router.admission.running == 0


async def _texts(call: Any) -> str:
    return "".join([delta.text for message in await rest(call) for delta in message.deltas])


async def refused(call: Any) -> tuple[grpc.StatusCode, ErrorDetails]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _texts(call)
    return caught.value.code(), details(caught)


async def test_a_full_queue_refuses_with_a_delay(tenants: TenantsFile) -> None:
    tenants.write("{max_running: 1, max_queued: 1}")
    async with fake_backends(1) as (a,), front([a], tenants=str(tenants)) as ready:
        first = await held(ready, a)
        waits = asyncio.create_task(refused(stream(ready, "x")))
        await until_waiting(ready.router, 1)
        code, said = await refused(stream(ready, "x"))
        assert (code, said.reason) == (EXHAUSTED, "QUEUE_FULL")
        assert said.retry_after is not None
        assert said.retry_after > 0
        pushes = asyncio.create_task(_texts(stream(ready, "x", 1)))
        code, said = await asyncio.wait_for(waits, 10)
        assert (code, said.reason) == (EXHAUSTED, "QUEUE_FULL"), "pushed out by a more urgent one"
        assert said.retry_after
        a.hold.set()  # type: ignore[union-attr]
        await pushes
        await _texts(first)
        assert len(a.requests) == 2
        assert await ready.inference.ListModels(inference.ListModelsRequest()), "not for these"


async def test_who_leaves_frees_the_place(tenants: TenantsFile) -> None:
    tenants.write("{max_running: 1, max_queued: 1}")
    async with fake_backends(1) as (a,), front([a], tenants=str(tenants)) as ready:
        first = await held(ready, a)
        gone = stream(ready)
        gone_read = asyncio.ensure_future(gone.read())
        await until_waiting(ready.router, 1)
        gone.cancel()
        await asyncio.gather(gone_read, return_exceptions=True)
        await until_waiting(ready.router, 0)
        late = asyncio.create_task(refused(stream(ready, timeout=0.3)))
        await until_waiting(ready.router, 1)
        code, said = await late
        assert code in (grpc.StatusCode.DEADLINE_EXCEEDED, EXHAUSTED), said.reason
        await until_waiting(ready.router, 0)
        first.cancel()
        a.hold.set()  # type: ignore[union-attr]
        assert await _texts(stream(ready)) == "a0 a1 a2 "
        assert len(a.requests) == 2
        assert ready.router.admission.running == 0


async def test_nobody_waits_longer_than_is_allowed(tenants: TenantsFile) -> None:
    tenants.write("{max_running: 1, max_wait_seconds: 0.2}")
    async with fake_backends(1) as (a,), front([a], tenants=str(tenants)) as ready:
        first = await held(ready, a)
        code, said = await asyncio.wait_for(refused(stream(ready)), 10)
        assert (code, said.reason) == (EXHAUSTED, "WAIT_TOO_LONG")
        first.cancel()


async def test_the_file_is_read_again(tenants: TenantsFile) -> None:
    tenants.write("max_running: 1")
    async with fake_backends(1) as (a,), front([a], tenants=str(tenants)) as ready:
        first = await held(ready, a)
        second = stream(ready)
        reading = asyncio.ensure_future(second.read())
        await until_waiting(ready.router, 1)
        tenants.write("max_running: -1  # kept out")
        assert (await refused(stream(ready, timeout=0.2)))[0] is not grpc.StatusCode.INTERNAL
        assert not reading.done()
        tenants.write("max_running: 2")
        assert (await asyncio.wait_for(reading, 10)).deltas
        for call in (first, second):
            call.cancel()


async def test_backends_with_full_queues_are_spared(tenants: TenantsFile) -> None:
    tenants.write("max_backend_waiting: 4")
    async with fake_backends(1, waiting=4) as (a,), front([a], tenants=str(tenants)) as ready:
        call = asyncio.create_task(_texts(stream(ready)))
        await until_waiting(ready.router, 1)
        assert not a.requests
        a.waiting = 3
        assert await asyncio.wait_for(call, 10) == "a0 a1 a2 "
        await a.stop()  # and with no backend at all nobody waits
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _texts(stream(ready, timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_tokens_are_settled_by_what_the_answer_says(tenants: TenantsFile) -> None:
    """The backend says 5 prompt tokens and 3 of output; 100 were reserved."""
    tenants.write("{default_output_tokens: 99, default: {tokens_per_minute: 110}}")
    async with fake_backends(1) as (a,), front([a], tenants=str(tenants)) as ready:
        assert await _texts(stream(ready, "x")) == "a0 a1 a2 "
        assert await _texts(stream(ready, "x")), "92 of the 100 were given back"
        first = await held(ready, a)
        code, said = await refused(stream(ready))
        assert (code, said.reason) == (EXHAUSTED, "RATE_LIMITED")
        assert said.retry_after is not None
        assert 30 < said.retry_after < 60
        first.cancel()


async def test_what_never_ran_costs_nothing(tenants: TenantsFile) -> None:
    tenants.write("{default_output_tokens: 99, default: {tokens_per_minute: 110}}")
    async with fake_backends(1) as (a,), front([a], tenants=str(tenants)) as ready:
        a.fail_with = ServiceError(Reason.NEVER_FITS, "too long")
        for _ in range(3):
            assert (await refused(stream(ready)))[1].reason == "NEVER_FITS"
        a.fail_with = None
        assert await _texts(stream(ready)) == "a0 a1 a2 "


async def test_requests_that_are_too_large_or_unclear(tenants: TenantsFile) -> None:
    tenants.write("default: {max_request_kib: 1}")
    async with fake_backends(1) as (a,), front([a], tenants=str(tenants)) as ready:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.inference.Generate(inference.GenerateRequest(text="x" * 1025))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready.inference.Generate(
                inference.GenerateRequest(text="hi"), metadata=((PRIORITY_KEY, "soon"),)
            )
        assert details(caught).fields == ["metadata"]
        assert not a.requests


async def test_requests_of_one_stream_wait_one_by_one(tenants: TenantsFile) -> None:
    """KServe's stream carries many requests; each has its own ticket."""
    tenants.write("{max_running: 1, max_queued: 1}")
    async with fake_backends(1) as (a,), front([a], tenants=str(tenants)) as ready:
        first = await held(ready, a)
        stub: Any = kserve_pb2_grpc.GRPCInferenceServiceStub(ready.channel)

        async def requests() -> Any:
            for number in range(3):
                yield kserve.ModelInferRequest(id=str(number))

        call = stub.ModelStreamInfer(requests())
        messages = [await asyncio.wait_for(call.read(), 10) for _ in range(2)]
        assert all("QUEUE_FULL" in message.error_message for message in messages)
        await until_waiting(ready.router, 1)
        call.cancel()
        await until_waiting(ready.router, 0)
        first.cancel()


async def test_other_listeners_can_call_it(tenants: TenantsFile) -> None:
    """As an HTTP front end does: no gRPC context, a deadline of its own."""
    tenants.write("{max_running: 1, max_queued: 1}")
    who = Principal("key", "x", frozenset({Role.INFERENCE}))
    async with fake_backends(1) as (a,), front([a], tenants=str(tenants)) as ready:
        admission = ready.router.admission
        async with admission.admit(who, 0, Cost(10, 20), 30.0) as permit:
            assert admission.running == 1
            code, said = await refused(stream(ready, timeout=0.2))
            assert code in (grpc.StatusCode.DEADLINE_EXCEEDED, EXHAUSTED), said.reason
            permit.settle(12.0)
        assert admission.running == 0


async def test_over_http_it_is_the_same(tenants: TenantsFile) -> None:
    tenants.write("{max_running: 1, max_queued: 1, default: {max_class: high}}")
    async with fake_backends(1) as (a,), http_front([a], tenants=str(tenants)) as http:
        a.hold = asyncio.Event()
        async with http.stream("/v1/completions", COMPLETION) as answer:
            await anext(events(answer))
            low, high = ({PRIORITY_KEY: priority} for priority in ("-1", "1"))
            waits = asyncio.create_task(http.post("/v1/completions", COMPLETION, headers=low))
            await until_waiting(http.router, 1)
            urgent = asyncio.create_task(http.post("/v1/completions", COMPLETION, headers=high))
            reply = await asyncio.wait_for(waits, 10)
            assert (reply.status, reply.error["code"]) == (429, "QUEUE_FULL")
            assert int(reply.headers["Retry-After"]) >= 1
            a.hold.set()
        assert (await asyncio.wait_for(urgent, 10)).status == 200


async def test_without_a_file_nobody_waits() -> None:
    async with fake_backends(1) as (a,), front([a]) as ready:
        first = await held(ready, a)
        second = await held(ready, a)
        assert ready.router.admission.running == 0
        for call in (first, second):
            call.cancel()
