"""Requests meant to hurt, sent to real servers: bombs, errors too long to arrive, grammars that
explode."""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest

from gpu_service.frontend.structured import grammar_of
from gpu_service.model.structured import GrammarChecker
from neo_common.errors import ErrorDetails, ServiceError
from neo_common.grpc.server import ServiceServer
from neo_common.grpc.settings import ListenSettings
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import inference_pb2_grpc as pb_grpc
from protos.neo.v1 import types_pb2 as types
from tests.fuzz.front import VOCAB, servicer, tokenizer
from tests.support.fake_backend import fake_backends
from tests.support.http import http_front

MIB = 1 << 20
SERVICE = "/neo.v1.InferenceService/"


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    """To a server that takes messages of 4 MiB."""
    described = pb.DESCRIPTOR.services_by_name["InferenceService"]
    settings = ListenSettings(max_message_mib=4)
    server = ServiceServer("127.0.0.1:0", [described], settings=settings)
    pb_grpc.add_InferenceServiceServicer_to_server(servicer(), server.grpc)
    await server.start()
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.address, options=options) as opened:
        yield opened
    await server.stop()


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_compressed_bomb_is_refused_before_it_is_whole(
    channel: grpc.aio.Channel, how: grpc.Compression
) -> None:
    """64 MiB in 64 KiB: the limit holds for what the bytes become, too."""
    send = channel.unary_unary(f"{SERVICE}Tokenize")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(bytes(64 * MIB), compression=how, timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    request = pb.TokenizeRequest(text="a" * 300)
    answer = await send(request.SerializeToString(), compression=how, timeout=60)
    assert len(pb.TokenizeResponse.FromString(answer).token_ids) == 300


@pytest.mark.parametrize("name", ["x" * MIB, "\U0001f600" * 50_000], ids=["ascii", "emoji"])
async def test_an_error_arrives_however_long_what_it_names(
    channel: grpc.aio.Channel, name: str
) -> None:
    """It came as RESOURCE_EXHAUSTED: the status was longer than clients take."""
    stub = pb_grpc.InferenceServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetModel(pb.GetModelRequest(model=name), timeout=60)
    details = ErrorDetails(caught.value)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (details.reason, details.fields) == ("UNKNOWN_MODEL", ["model"])


async def test_compressed_bodies_are_refused_as_they_are() -> None:
    async with fake_backends(1) as backends, http_front(backends) as http:
        url = f"{http.url}/v1/completions"
        bomb = gzip.compress(b'{"prompt": "' + b"a" * (64 * MIB) + b'"}')
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        async with aiohttp.ClientSession() as session:
            for headers in (
                {"Content-Encoding": "gzip"},
                {"Content-Encoding": "identity, gzip"},
                {"Transfer-Encoding": "gzip, chunked"},
            ):
                kind = {"Content-Type": "application/json", **headers}
                try:
                    async with session.post(url, data=bomb, headers=kind) as answer:
                        assert answer.status in (400, 415), await answer.text()
                except aiohttp.ClientError:
                    continue  # the connection was closed: these bytes are no HTTP
            body = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
            kind = {"Content-Type": "application/json"}
            async with session.post(url, data=body, headers=kind) as answer:
                assert answer.status == 400
                assert (await answer.json())["error"]["code"] == "INVALID_ARGUMENT"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 64 * 1024, f"{grown >> 10} MiB"


# Structured output -------------------------------------------------------------------------------

_DEEP = 20_000
LOOP_SECONDS = 0.3
"""CPU, of a slow machine: what a client's bytes may take on the event loop at once."""
_CHAIN = "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(400))
HOSTILE: dict[str, dict[str, Any]] = {
    "parentheses": {"regex": "(" * _DEEP + "a" + ")" * _DEEP},
    "states": {"regex": "(.*a.{200}|.*b.{300})*"},
    "repeated": {"regex": "((a{1000}){1000}){1000}"},
    "lark-parentheses": {"grammar": "start: " + "(" * _DEEP + '"a"' + ")" * _DEEP},
    "gbnf-parentheses": {"grammar": "root ::= " + "(" * _DEEP + '"a"' + ")" * _DEEP},
    "lark-left": {"grammar": 'start: start start | "a" | ""'},
    "lark-blank-lines": {"grammar": 'start: "a"' + "\n" * 60_000 + "T: /a/"},
    "lark-doubling": {"grammar": f'start: T0\n{_CHAIN}\nT400: "a"'},
    "lark-terminals": {
        "grammar": "start: T0\n" + "\n".join(f"T{i}: T{i + 1}" for i in range(3000))
    },
    "gbnf-long": {"grammar": "root ::= " + " | ".join(f'"w{i}" [a-z]+' for i in range(2500))},
    "lark-repeated": {"grammar": 'start: (("a"~30000)~30000)~30000'},
    "schema-nested": {"json_schema": '{"a":' * 10_000 + "1" + "}" * 10_000},
    "schema-lists": {"json_schema": "[" * 30_000 + "]" * 30_000},
    "schema-itself": {"json_schema": '{"$ref": "#"}'},
    "schema-doubling": {
        "json_schema": json.dumps(
            {
                "$ref": "#/$defs/a0",
                "$defs": {
                    **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)},
                    "a40": {"type": "string"},
                },
            }
        )
    },
    "schema-items": {"json_schema": '{"type": "array", "minItems": 1000000000}'},
    "schema-elsewhere": {"json_schema": '{"$ref": "http://127.0.0.1:9/"}'},
    "schema-file": {"json_schema": '{"$ref": "file:///etc/passwd"}'},
    "same-first": {"choices": types.ChoiceList(texts=["a" * n for n in range(1, 300)])},
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_grammar_that_explodes_holds_up_nobody(name: str) -> None:
    """Taken or refused with its field, off the event loop, on which others' streams go on."""
    checker = GrammarChecker(tokenizer(), VOCAB)
    await grammar_of(types.SamplingParams(structured=types.StructuredOutput(regex="a")), checker)
    params = types.SamplingParams(structured=types.StructuredOutput(**HOSTILE[name]))
    slowest = asyncio.create_task(_slowest_turn())
    refused = None
    try:
        async with asyncio.timeout(120):
            assert await grammar_of(params, checker)
    except ServiceError as error:
        refused = error.field
    await asyncio.sleep(0)
    slowest.cancel()
    (kind,) = HOSTILE[name]
    assert refused in (None, f"sampling.structured.{kind}")
    assert await slowest < LOOP_SECONDS


async def _slowest_turn() -> float:
    """Seconds of CPU that this thread spent in one turn of the event loop, until cancelled."""
    most, before = 0.0, time.thread_time()
    try:
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            most, before = max(most, now - before), now
    except asyncio.CancelledError:
        return max(most, time.thread_time() - before)
