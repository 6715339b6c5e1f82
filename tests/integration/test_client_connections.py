"""neo_client over TLS, with credentials, and over several routers of which some fail."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from neo_client import AsyncClient, Client, Retries, Tls
from neo_client.connect import Connection
from neo_common.errors import ErrorDetails
from neo_common.grpc.settings import ListenSettings
from tests.support.credentials import Authority, write_keys
from tests.support.fake_backend import FakeBackend, fake_backends
from tests.support.secured import backend


def together(backends: list[FakeBackend]) -> str:
    return ",".join(one.address for one in backends)


async def until_all_answer(client: AsyncClient, names: set[str]) -> None:
    """The first call may be answered before the other connections stand."""
    async with asyncio.timeout(20):
        while names:
            names -= {(await client.generate("hi")).model}


async def test_calls_are_shared_and_go_on_when_a_server_dies() -> None:
    async with fake_backends(3) as servers, AsyncClient(together(servers)) as client:
        await until_all_answer(client, {"a", "b", "c"})
        answers = Counter([(await client.generate("hi")).model for _ in range(30)])
        assert answers == {"a": 10, "b": 10, "c": 10}
        await servers[0].stop()
        answers = Counter([(await client.generate("hi")).model for _ in range(30)])
        assert set(answers) == {"b", "c"}
        assert sum(answers.values()) == 30, "no call may fail while servers are left"
        streams = [
            "".join([d.text async for m in client.stream("hi") for d in m.deltas]) for _ in range(4)
        ]
        assert set(streams) == {"b0 b1 b2 ", "c0 c1 c2 "}


async def test_a_server_that_comes_back_is_used_again() -> None:
    async with fake_backends(2) as servers, AsyncClient(together(servers)) as client:
        await until_all_answer(client, {"a", "b"})
        address = servers[0].address
        await servers[0].stop()
        assert (await client.generate("hi")).model == "b"
        await servers[0].start(address)
        await until_all_answer(client, {"a"})


async def test_servers_that_are_not_healthy_get_no_calls() -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(backend(ListenSettings()))
        first.name = "sick"
        await first.server.set_serving(False)
        second = await stack.enter_async_context(backend(ListenSettings()))
        client = await stack.enter_async_context(AsyncClient(together([first, second])))
        assert {(await client.generate("hi")).model for _ in range(6)} == {"a"}
        await second.server.set_serving(False)
        await first.server.set_serving(True)
        await until_all_answer(client, {"sick"})


async def test_no_attempt_follows_the_first_message() -> None:
    async with (
        fake_backends(2, hold=asyncio.Event()) as servers,
        AsyncClient(together(servers)) as client,
    ):
        messages = client.stream("hi")
        await anext(messages)
        (serving,) = [one for one in servers if one.requests]
        await serving.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(messages)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert sum(len(one.requests) for one in servers) == 1


async def test_retries_can_be_turned_off() -> None:
    async with fake_backends(1) as (server,):
        address = server.address
        await server.stop()
        async with AsyncClient(address, retries=Retries(generations=1)) as client:
            with pytest.raises(grpc.aio.AioRpcError):
                await client.generate("hi", deadline_seconds=20)


async def test_both_clients_over_tls_with_keys(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server", "neo.example")
    keys = write_keys(tmp_path / "keys.yaml", ci=["inference"])
    settings = ListenSettings(
        tls_cert=certificate, tls_key=key, api_keys=str(tmp_path / "keys.yaml")
    )
    tls = Tls(ca=authority.file, name="neo.example")
    tokens = [keys["ci"]]
    async with backend(settings) as one, backend(settings) as other:
        address = together([one, other])
        async with AsyncClient(address, tls=tls, token=lambda: tokens[-1]) as client:
            assert (await client.generate("hi")).model == "a"
            assert [m async for m in client.stream("hi")][-1].usage.completion_tokens == 3
            assert (await client.model()).name == "a"
            tokens.append("neo_revoked")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.generate("hi")
            assert ErrorDetails(caught.value).reason == "UNAUTHENTICATED"

        def use() -> None:
            with Client(one.address, tls=tls, token=keys["ci"]) as client:
                assert client.generate("hi").model == "a"
                with client.stream("hi") as messages:
                    assert len(list(messages)) == 4
                assert client.models()[0].name == "a"
                assert client.tokenize("A") == [65]

        await asyncio.to_thread(use)


@pytest.mark.parametrize(
    ("address", "named", "problem"),
    [
        ("127.0.0.1:1,b", {}, "address must be HOST:PORT"),
        ("127.0.0.1:1,:2", {}, "address must be HOST:PORT"),
        ("host.invalid:1,127.0.0.1:2", {}, "host.invalid is not known"),
        ("127.0.0.1:1,[::1]:2", {}, "all have IPv4"),
        ("10.0.0.1:1,10.0.0.2:1", {"tls": Tls()}, "tls.name must be given"),
        ("10.0.0.1:1", {"token": "t"}, "token needs tls"),
        ("127.0.0.1:1,10.0.0.1:1", {"token": "t"}, "token needs tls"),
        ("a:1", {"tls": Tls(ca="/absent")}, "tls_ca: cannot read"),
        ("a:1", {"tls": Tls(certificate="/absent")}, "given together"),
        ("a:1", {"retries": Retries(generations=0)}, "retries.generations"),
        ("a:1", {"retries": Retries(max_seconds=0)}, "retries.max_seconds"),
    ],
)
def test_what_cannot_be_connected_to(address: str, named: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Connection(address, **named)


def test_a_token_may_go_to_this_machine_in_the_clear() -> None:
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/socket"):
        assert Connection(address, token="t").metadata() == (("authorization", "Bearer t"),)
    assert Connection("127.0.0.1:1").metadata() == ()
