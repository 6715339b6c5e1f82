"""The HTTP listener of a real router before scripted backends: errors, disconnects, slow readers,
limits, drain."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from neo_common.errors import Reason, ServiceError
from neo_http.completions import CompletionShape
from neo_http.errors import http_status
from protos.neo.v1 import inference_pb2 as inference
from tests.support.fake_backend import FakeBackend, fake_backends
from tests.support.http import CHAT, COMPLETION, Http, events, http_front


async def begun(stream: AsyncIterator[str]) -> dict[str, Any]:
    first: dict[str, Any] = json.loads(await anext(stream))
    return first


async def raw(http: Http, data: bytes) -> bytes:
    """What comes back for these bytes until the server closes."""
    host, _, port = http.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reason", list(Reason))
async def test_every_reason_has_its_status(reason: Reason, stream: bool) -> None:
    error = ServiceError(reason, "sampling.n is bad", field="sampling.n", retry_after=0.2)
    async with fake_backends(1, fail_with=error) as backends, http_front(backends) as http:
        reply = await http.post("/v1/completions", {**COMPLETION, "stream": stream})
    assert reply.status == http_status(reason.value, reason.status_code)
    assert reply.error == {
        "message": "n is bad", "type": reply.error["type"], "param": "n", "code": reason.value,
    }  # fmt: skip
    assert reply.headers["Retry-After"] == "1"
    assert reply.headers["Retry-After-Ms"] == "200"
    assert reply.headers["Content-Type"] == "application/json"


async def test_nobody_to_serve() -> None:
    async with http_front([]) as http:
        health = await http.get("/health")
        reply = await http.post("/v1/completions", COMPLETION)
    assert health.status == 503
    assert (reply.status, reply.error["code"]) == (503, "NO_BACKEND")
    assert reply.headers["Retry-After"] == "1"


async def test_too_many_calls() -> None:
    async with fake_backends(1) as (a,), http_front([a], max_calls=1) as http:
        a.hold = asyncio.Event()
        async with http.stream("/v1/completions", COMPLETION) as answer:
            stream = events(answer)
            await begun(stream)
            reply = await http.post("/v1/completions", COMPLETION)
            a.hold.set()
            assert [event async for event in stream][-1] == "[DONE]"
        assert (reply.status, reply.error["code"]) == (429, "OVERLOADED")
        assert reply.error["type"] == "rate_limit_error"
        assert reply.headers["Retry-After"] == "1"
        assert (await http.get("/health")).status == 200


async def test_too_much_at_once() -> None:
    """A body counts until its answer has ended."""
    large = {**COMPLETION, "prompt": "x" * (600 << 10)}
    limits = {"http_max_body_mib": 1, "http_bodies_mib": 1}
    async with fake_backends(1) as (a,), http_front([a], **limits) as http:
        a.hold = asyncio.Event()
        async with http.stream("/v1/completions", large) as answer:
            stream = events(answer)
            await begun(stream)
            reply = await http.post("/v1/completions", large)
            assert (reply.status, reply.error["code"]) == (429, "OVERLOADED")
            assert reply.headers["Retry-After"] == "1"
            a.hold.set()
            assert [event async for event in stream][-1] == "[DONE]"
        assert (await http.post("/v1/completions", large)).status == 200

        async def pieces() -> AsyncIterator[bytes]:
            yield json.dumps({**COMPLETION, "stream": True}).encode()

        # One whose length is not known beforehand takes what has come, and no more.
        a.hold = asyncio.Event()
        async with http.session.post(
            http.url + "/v1/completions", data=pieces(),
            headers={"Content-Type": "application/json"},
        ) as answer:  # fmt: skip
            stream = events(answer)
            await begun(stream)
            a.hold.set()
            assert (await http.post("/v1/completions", large)).status == 200


async def test_a_deadline_of_the_client() -> None:
    async with fake_backends(1) as (a,), http_front([a]) as http:
        a.hold = asyncio.Event()
        assert (await http.get("/health")).status == 200
        body = {**COMPLETION, "timeout_ms": 200, "stream": True}
        reply = await http.post("/v1/completions", body)
        *_, last = reply.body.strip().split(b"\n\n")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "DEADLINE_EXCEEDED"
        assert 0 < (a.time_left[0] or 0) < 1


@pytest.mark.parametrize("batch", [False, True])
async def test_a_client_that_hangs_up_ends_the_calls(batch: bool) -> None:
    async with fake_backends(1) as (a,), http_front([a]) as http:
        a.hold = asyncio.Event()
        body = {**COMPLETION, "prompt": ["x", "y"] if batch else "x"}
        async with http.stream("/v1/completions", body) as answer:
            stream = events(answer)
            await begun(stream)
            if batch:
                await begun(stream)
            assert a.live == 1 + batch
            answer.close()
        async with asyncio.timeout(20):
            await http.router.server.guard.idle.wait()
            await a.cancelled.wait()


async def test_a_failed_prompt_of_a_batch_ends_the_others() -> None:
    class Picky(FakeBackend):
        async def _begin(self, request: Any, context: Any) -> None:
            if request.text == "bad":
                error = ServiceError(Reason.NEVER_FITS, "no", field="sampling.max_tokens")
                await context.abort_with_status(error.to_status())
            await super()._begin(request, context)

    a = Picky("a")
    a.hold = asyncio.Event()
    await a.start()
    try:
        async with http_front([a]) as http:
            body = {**COMPLETION, "prompt": ["x", "bad"], "stream": True}
            reply = await http.post("/v1/completions", body)
            assert b"NEVER_FITS" in reply.body
            assert b"[DONE]" not in reply.body
            async with asyncio.timeout(20):
                await http.router.server.guard.idle.wait()
    finally:
        await a.stop()


async def test_a_backend_lost_mid_stream() -> None:
    async with fake_backends(1) as (a,), http_front([a]) as http:
        a.hold = asyncio.Event()
        async with http.stream("/v1/chat/completions", CHAT) as answer:
            assert answer.status == 200
            stream = events(answer)
            await begun(stream)
            await a.stop()
            rest = [json.loads(event) async for event in stream]
        assert [each["error"]["code"] for each in rest] == ["BACKEND_LOST"], "and no [DONE]"


async def test_a_slow_reader_slows_down_its_call() -> None:
    """64 MiB of stream, and a client that reads nothing: the backend is held up long before."""

    class Wordy(FakeBackend):
        sent = 0

        async def GenerateStream(self, request: Any, context: Any) -> Any:
            for _ in range(1024):
                delta = inference.Choice(text="x" * 65536, token_ids=[1])
                yield inference.GenerateStreamResponse(deltas=[delta])
                self.sent += 1
            yield inference.GenerateStreamResponse(usage={})

    a = Wordy("a")
    await a.start()
    try:
        async with http_front([a]) as http, http.stream("/v1/completions", COMPLETION) as answer:
            assert answer.status == 200
            still, before = 0, -1
            async with asyncio.timeout(60):
                while still < 5:  # no event tells that nothing happens
                    await asyncio.sleep(0.1)
                    still = still + 1 if a.sent == before else 0
                    before = a.sent
            assert 0 < a.sent < 700
            total = sum([len(event) async for event in events(answer)])
            assert total > 64 << 20
            assert a.sent == 1024
    finally:
        await a.stop()


async def test_drain_finishes_streams_and_refuses_the_rest() -> None:
    async with fake_backends(1) as (a,), http_front([a], drain_grace_seconds=20.0) as http:
        a.hold = asyncio.Event()
        async with http.stream("/v1/completions", COMPLETION) as answer:
            stream = events(answer)
            await begun(stream)
            stopping = asyncio.create_task(http.router.stop())
            async with asyncio.timeout(20):
                while (await http.get("/health")).status != 503:
                    pass
            reply = await http.post("/v1/completions", COMPLETION)
            assert (reply.status, reply.error["code"]) == (503, "DRAINING")
            assert reply.headers["Retry-After"] == "1"
            assert reply.headers["Connection"] == "close"
            assert not stopping.done()
            a.hold.set()
            rest = [event async for event in stream]
        assert rest[-1] == "[DONE]"
        assert await stopping, "nothing was cut"


async def test_a_stream_that_outlives_the_grace_is_cut() -> None:
    async with fake_backends(1) as (a,), http_front([a], drain_grace_seconds=0.2) as http:
        a.hold = asyncio.Event()
        async with http.stream("/v1/completions", COMPLETION) as answer:
            stream = events(answer)
            await begun(stream)
            assert not await http.router.stop()
            async with asyncio.timeout(20):
                await a.cancelled.wait()
                with pytest.raises(Exception):  # noqa: B017, PT011  # aiohttp has several for it
                    assert [event async for event in stream][-1] == "[DONE]"


BAD_REQUESTS = {
    "no HTTP": b"hello\r\n\r\n",
    "a bad line": b"GET\r\n\r\n",
    "two lengths": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"
    b"Content-Length: 2\r\n\r\n",
    "length and chunks": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000,
    "many headers": b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(300)),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
}


async def test_old_connections_end_with_their_request() -> None:
    body = json.dumps({**COMPLETION, "stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    async with fake_backends(1) as (a,), http_front([a], max_connection_age_seconds=0.2) as http:
        host, _, port = http.url.removeprefix("http://").rpartition(":")
        a.hold = asyncio.Event()
        async with asyncio.timeout(20):
            busy, writer = await asyncio.open_connection(host, int(port))
            writer.write(head.encode() + body)
            await busy.readuntil(b"data: ")
            for _ in range(2):
                idle, _ = await asyncio.open_connection(host, int(port))
                assert await idle.read() == b"", "and so more time has gone by"
            a.hold.set()
            rest = await busy.read()
        assert b"[DONE]" in rest
        assert (await http.get("/health")).status == 200


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bytes_that_are_no_request(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async with http_front([]) as http:
        answer = await raw(http, BAD_REQUESTS[name])
        assert re.match(rb"HTTP/1\.[01] 400 ", answer)
        assert (await http.get("/health")).status == 503
    assert not [record for record in caplog.records if "http" in record.name]


async def test_bodies_that_are_too_large_or_of_another_kind() -> None:
    async with fake_backends(1) as (a,), http_front([a], http_max_body_mib=1) as http:
        large = b'{"prompt": "' + b"x" * (1 << 20) + b'"}'
        reply = await http.post("/v1/completions", large)
        assert (reply.status, reply.error["code"]) == (413, "BODY_TOO_LARGE")

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(32):
                yield large[:65536]

        async with http.session.post(
            http.url + "/v1/completions", data=pieces(),
            headers={"Content-Type": "application/json"},
        ) as answer:  # fmt: skip
            assert answer.status == 413
        for headers in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
            reply = await http.post("/v1/completions", COMPLETION, headers=headers)
            assert (reply.status, reply.error["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
        reply = await http.post("/v1/completions", b'{"prompt": NaN}')
        assert (reply.status, reply.error["code"]) == (400, "INVALID_ARGUMENT")
        assert a.requests == []


async def test_paths_and_methods() -> None:
    async with fake_backends(1) as (a,), http_front([a]) as http:
        reply = await http.get("/v1/engines")
        assert (reply.status, reply.error["code"]) == (404, "UNKNOWN_PATH")
        reply = await http.get("/v1/completions")
        assert (reply.status, reply.error["code"]) == (405, "METHOD_NOT_ALLOWED")
        assert reply.headers["Allow"] == "POST"
        reply = await http.get("/v1/models/other/name")
        assert (reply.status, reply.error["code"]) == (404, "UNKNOWN_MODEL")
        reply = await http.get("/v1/models")
        assert [model["id"] for model in reply.json["data"]] == ["a"]


async def test_a_body_that_does_not_come() -> None:
    async with fake_backends(1) as (a,), http_front([a], http_body_seconds=0.2) as http:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = await raw(http, head)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"BODY_TIMEOUT" in answer


async def test_connections_are_bounded_and_idle_ones_closed() -> None:
    async with (
        fake_backends(1) as (a,),
        http_front([a], http_max_connections=2, http_idle_seconds=0.5) as http,
    ):
        host, _, port = http.url.removeprefix("http://").rpartition(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        answer = await raw(http, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"OVERLOADED" in answer
        async with asyncio.timeout(20):
            for reader, _ in idle:
                assert await reader.read() == b"", "closed for saying nothing"
        assert (await http.get("/health")).status == 200


async def test_our_own_bugs_get_a_ticket(caplog: pytest.LogCaptureFixture) -> None:
    async with fake_backends(1) as (a,), http_front([a]) as http:

        def burst() -> Any:
            raise KeyError("secret")

        http.router.registry.choose = burst  # type: ignore[method-assign, assignment]
        reply = await http.post("/v1/completions", {**COMPLETION, "prompt": "private words"})
    assert (reply.status, reply.error["code"]) == (500, "INTERNAL_ERROR")
    assert "secret" not in reply.body.decode()
    ticket = reply.error["message"].rpartition(" ")[2]
    assert ticket in caplog.text
    assert "private words" not in caplog.text


async def test_our_own_bugs_in_the_middle_of_a_stream(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = CompletionShape.delta

    def fails_later(self: Any, piece: Any, texts: Any, question: Any, first: bool) -> Any:
        assert first, "secret"
        return told(self, piece, texts, question, first)

    monkeypatch.setattr(CompletionShape, "delta", fails_later)
    async with fake_backends(1) as (a,), http_front([a]) as http:
        reply = await http.post("/v1/completions", {**COMPLETION, "stream": True})
        async with asyncio.timeout(20):
            await http.router.server.guard.idle.wait()
    *_, last = reply.body.strip().split(b"\n\n")
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == "INTERNAL_ERROR"
    assert error["message"].rpartition(" ")[2] in caplog.text
    assert b"secret" not in reply.body


async def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"http_listen: {address} cannot be bound"):
            async with http_front([], http_listen=address):
                pass
