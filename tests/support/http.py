"""A router with an HTTP listener in this process, and a client that sees what is on the wire."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from router.app import Router, running
from router.config import RouterConfig
from tests.support.fake_backend import FakeBackend
from tests.support.secured import FAST, usable

NOBODY = "127.0.0.1:9"
"""Where nothing listens."""
COMPLETION = {"model": "a", "prompt": "hi"}
CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


@dataclass
class Http:
    """Speaks to one listener over connections of its own."""

    router: Router
    session: aiohttp.ClientSession
    url: str

    async def post(self, path: str, body: Any, **options: Any) -> Reply:
        """body: bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        async with self.session.post(
            self.url + path, data=data, headers=headers, **options
        ) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    async def get(self, path: str, **options: Any) -> Reply:
        async with self.session.get(self.url + path, **options) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    @asynccontextmanager
    async def stream(self, path: str, body: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self.session.post(self.url + path, json={**body, "stream": True}) as answer:
            yield answer


async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """What stands behind `data: `."""
    async for line in answer.content:
        if line.strip():
            assert line.startswith(b"data: ")
            yield line[6:].decode().strip()


@asynccontextmanager
async def http_front(
    backends: list[FakeBackend], *, ssl: Any = None, **settings: Any
) -> AsyncIterator[Http]:
    """A router before `backends`, at least one of which takes calls. ssl: the client's context."""
    config = RouterConfig(
        backends=tuple(backend.address for backend in backends) or (NOBODY,),
        **{**FAST, "http_listen": "127.0.0.1:0", **settings},
    )
    connector = aiohttp.TCPConnector(ssl=True if ssl is None else ssl)
    async with (
        running(config) as router,
        aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=60)
        ) as session,
    ):
        assert router.http is not None
        if backends:
            await usable(router)
        scheme = "http" if ssl is None else "https"
        yield Http(router, session, f"{scheme}://{router.http.address}")
