"""Following EndpointSlices, as an API server that plays every trick tells of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from protos.neo.v1 import inference_pb2 as inference
from router.discovery import kubernetes
from router.discovery.kubernetes import ApiServer, follow
from router.discovery.targets import KubernetesTarget
from router.views import BackendState
from tests.support.fake_backend import fake_backends
from tests.support.front import deltas_left, front

GPU = KubernetesTarget("ns", "gpu", "7001")
PATH = "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices"
SELECTOR = "kubernetes.io/service-name=gpu"
SECONDS = 30


def a_slice(name: str, *hosts: str, version: str = "1", port: int = 7001) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name, "resourceVersion": version,
            "labels": {"kubernetes.io/service-name": "gpu"},
        },
        "endpoints": [{"addresses": [host], "conditions": {"ready": True}} for host in hosts],
        "ports": [{"name": "grpc", "port": port}],
    }  # fmt: skip


@asynccontextmanager
async def followed(
    url: str, account: Path = Path("/nonexistent")
) -> AsyncIterator[asyncio.Queue[list[str]]]:
    """What is found, one after the other."""
    news: asyncio.Queue[list[str]] = asyncio.Queue()
    task = asyncio.create_task(
        follow(GPU, ApiServer(url, account), lambda found: news.put_nowait(sorted(found)))
    )
    try:
        async with asyncio.timeout(SECONDS):
            yield news
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# A server that has a script ---------------------------------------------------------------------


class Script:
    """Answers each request with the next of `answers`; a list is a watch's events, after which the
    connection ends, unless its last one is `...` (it stays open) or a queue of further ones."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, str]] = []
        self.requests: asyncio.Queue[tuple[dict[str, str], str | None]] = asyncio.Queue()
        """Query and Authorization of each."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(dict(request.query))
        await self.requests.put((dict(request.query), request.headers.get("Authorization")))
        answer = self.answers.pop(0) if self.answers else [...]
        if isinstance(answer, int):
            return web.Response(status=answer)
        if isinstance(answer, dict):
            return web.json_response(answer)
        response = web.StreamResponse()
        await response.prepare(request)
        for event in answer:
            if event is ...:
                await asyncio.Event().wait()
            while isinstance(event, asyncio.Queue):
                await response.write(json.dumps(await event.get()).encode() + b"\n")
            line = event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n"
            await response.write(line)
        return response


@asynccontextmanager
async def scripted(*answers: Any) -> AsyncIterator[tuple[Script, str]]:
    script = Script(*answers)
    app = web.Application()
    app.router.add_get(PATH, script.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield script, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def listed(version: str, *items: dict[str, Any], **metadata: str) -> dict[str, Any]:
    return {"metadata": {"resourceVersion": version, **metadata}, "items": list(items)}


def event(kind: str, item: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "object": item}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "FIRST_PAUSE", 0.02)


async def test_a_list_then_events_from_its_version() -> None:
    async with (
        scripted(
            listed("10", a_slice("s", "10.0.0.1")),
            [
                event("ADDED", a_slice("t", "10.0.0.2", version="11")),
                event("BOOKMARK", {"metadata": {"resourceVersion": "15"}}),
            ],
            [event("DELETED", a_slice("s", version="16")), ...],
        ) as (script, url),
        followed(url) as news,
    ):
        assert await news.get() == ["10.0.0.1:7001"]
        assert await news.get() == ["10.0.0.1:7001", "10.0.0.2:7001"]
        assert await news.get() == ["10.0.0.2:7001"]
        assert [asked.get("resourceVersion") for asked in script.asked] == [None, "10", "15"]
        assert all(asked["labelSelector"] == SELECTOR for asked in script.asked)
        assert script.asked[1]["allowWatchBookmarks"] == "true"


@pytest.mark.parametrize(
    "gone", [410, [event("ERROR", {"code": 410, "message": "too old"})]], ids=["status", "event"]
)
async def test_a_version_that_is_too_old_means_a_new_list(gone: Any) -> None:
    async with (
        scripted(
            listed("10", a_slice("s", "10.0.0.1")),
            gone,
            listed("90", a_slice("u", "10.0.0.9")),
            [...],
        ) as (script, url),
        followed(url) as news,
    ):
        assert await news.get() == ["10.0.0.1:7001"]
        assert await news.get() == ["10.0.0.9:7001"], "what the first list had is forgotten"
        for _ in range(4):
            query, _ = await script.requests.get()
        assert query["resourceVersion"] == "90"


@pytest.mark.parametrize(
    "trouble",
    [
        500,
        403,
        [b"not json\n"],
        [b'{"type": "ADDED"}\n'],
        [b"[1]\n"],
        [event("ADDED", {"metadata": None})],
        [event("ERROR", {"code": 500})],
    ],
    ids=["500", "403", "garbage", "incomplete", "list", "null", "error"],
)
async def test_trouble_changes_nothing_and_is_tried_again(trouble: Any) -> None:
    async with (
        scripted(
            trouble if isinstance(trouble, int) else listed("9", a_slice("s", "10.0.0.1")),
            trouble,
            listed("10", a_slice("s", "10.0.0.1"), a_slice("t", "10.0.0.2")),
        ) as (_, url),
        followed(url) as news,
    ):
        found = await news.get()
        if found == ["10.0.0.1:7001"]:
            found = await news.get()
        assert found == ["10.0.0.1:7001", "10.0.0.2:7001"]


async def test_long_lists_come_in_pages_and_the_token_is_read_anew(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    async with (
        scripted(
            {"metadata": {"continue": "more"}, "items": [a_slice("s", "10.0.0.1")]},
            listed("10", a_slice("t", "10.0.0.2")),
            410,
        ) as (script, url),
        followed(url, tmp_path) as news,
    ):
        assert await news.get() == ["10.0.0.1:7001", "10.0.0.2:7001"]
        assert [asked.get("continue") for asked in script.asked[:2]] == [None, "more"]
        token.write_text("second\n")
        tokens = [(await script.requests.get())[1]]
        while tokens[-1] != "Bearer second":
            tokens.append((await script.requests.get())[1])
        assert tokens[0] == "Bearer first"


async def test_a_server_that_cannot_be_reached_is_asked_again() -> None:
    async with followed("http://127.0.0.1:1") as news:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(news.get(), 0.3)


# A router ---------------------------------------------------------------------------------------


async def test_a_router_follows_the_pods_of_a_service() -> None:
    """Two backends on ports of their own, as two slices; one is taken away while it streams."""
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    async with fake_backends(2) as (a, b):
        first, second = (
            a_slice(backend.name, "127.0.0.1", port=int(backend.address.rpartition(":")[2]))
            for backend in (a, b)
        )
        async with (
            scripted(listed("1", first), [events]) as (_, url),
            front(
                [], backends=("k8s:///ns/gpu:grpc",), kubernetes_api=url,
                kubernetes_account="/nonexistent",
            ) as ready,
        ):  # fmt: skip
            await ready.states(BackendState.UP)
            assert await ready.text() == "a0 a1 a2 "
            events.put_nowait(event("ADDED", second))
            await ready.states(BackendState.UP, BackendState.UP)
            a.hold = asyncio.Event()
            b.hold = asyncio.Event()
            calls = [
                ready.inference.GenerateStream(inference.GenerateRequest(text="hi"))
                for _ in range(4)
            ]
            began = await asyncio.gather(*(call.read() for call in calls))
            assert {message.deltas[0].text for message in began} == {"a0 ", "b0 "}
            first["endpoints"][0]["conditions"] |= {"terminating": True, "ready": False}
            events.put_nowait(event("MODIFIED", first))
            await ready.states(BackendState.DRAINING, BackendState.UP)
            a.hold.set()
            b.hold.set()
            left = await asyncio.gather(*(deltas_left(call) for call in calls))
            assert left == [3] * 4, "what it had was finished"
            await ready.states(BackendState.UP)
            assert await ready.text() == "b0 b1 b2 "
