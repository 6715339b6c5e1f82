"""The router's status page, in a real browser, over backends whose load the test decides."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import inference_pb2_grpc
from router.app import Router, running
from router.config import RouterConfig
from tests.support.browser import Browser, browser
from tests.support.fake_backend import BLOCK_TOKENS, FakeBackend
from tests.support.stack import free_port

NASTY = "<img src=x onerror=document.title='broken'>"


class Busy(FakeBackend):
    """Decodes 40 tokens between two snapshots, half of its time inline and a quarter GPU-only."""

    looks = 0

    def snapshot(self) -> engine.LoadSnapshot:
        self.looks += 1
        load = super().snapshot()
        load.models.append(NASTY)
        load.gpu.free_blocks, load.gpu.running_requests = 250, 3
        load.gpu.tokens_total = 40 * self.looks
        load.host_tier_state = engine.HOST_TIER_STATE_UP
        load.host.total_blocks, load.host.free_blocks, load.host.running_requests = 400, 300, 5
        seconds = 0.1 * self.looks  # the interval of the snapshots
        load.mode_seconds_total["inline"] = 0.5 * seconds
        load.mode_seconds_total["gpu_only"] = 0.25 * seconds
        load.device_busy_seconds_total = 0.5 * seconds
        load.host_wait_seconds_total = 0.125 * seconds
        load.host_busy_seconds_total = 0.25 * seconds
        load.decision.mode, load.decision.why = "inline", "because <b>"
        return load


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Router, Busy, int]]:
    busy, port = Busy(name="a", waiting=2), free_port()
    await busy.start()
    config = RouterConfig(
        listen="127.0.0.1:0", backends=(busy.address, "127.0.0.1:1"), load_interval_ms=100,
        status_port=port,
    )  # fmt: skip
    try:
        async with running(config) as router:
            news = asyncio.Event()
            router.registry.on_change(news.set)
            async with asyncio.timeout(60):
                while not router.registry.usable():
                    news.clear()
                    await news.wait()
            with router.status.serve(port):
                yield router, busy, port
    finally:
        await busy.stop()


def get(port: int, path: str, host: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read()


async def call(router: Router) -> None:
    async with grpc.aio.insecure_channel(router.server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async for _ in stub.GenerateStream(inference.GenerateRequest(text="x")):
            pass


async def test_what_is_told_is_what_backends_and_calls_did() -> None:
    async with served() as (router, _, port):
        async with asyncio.timeout(60):
            while True:
                await call(router)
                status, body = await asyncio.to_thread(get, port, "/status.json")
                assert status == 200
                data = json.loads(body)
                rows = {row["address"]: row for row in data.get("backends", ())}
                row: dict[str, Any] = next(iter(rows.values()), {})
                if row.get("tokens_per_second") and any(p["messages"] for p in data["history"]):
                    break
                await asyncio.sleep(0.1)
        assert row["tiers"]["gpu"]["used_tokens"] == 750 * BLOCK_TOKENS
        assert row["tiers"]["host"] == {
            "running": 5, "total_tokens": 400 * BLOCK_TOKENS, "used_tokens": 100 * BLOCK_TOKENS
        }  # fmt: skip
        # Snapshots may come late on a busy machine, but what they say is in proportion.
        assert row["modes"]["inline"] == 2 * row["modes"]["gpu_only"] > 0
        assert abs(row["device_busy"] - 4 * row["host_wait"]) < 1e-9
        assert abs(row["device_busy"] - 2 * row["host_busy"]) < 1e-9
        assert row["decision"] == {"mode": "inline", "why": "because <b>"}
        assert rows["127.0.0.1:1"]["state"] == "down"
        point = next(p for p in data["history"] if p["messages"])
        assert point["started"] >= 1
        assert 0 < point["p50_seconds"] <= point["p95_seconds"]


async def test_only_this_machines_pages_may_read_it() -> None:
    async with served() as (_, _, port):
        for path, host, expected in [
            ("/", None, 200),
            ("/status.css", "localhost:1", 200),
            ("/status.json", "evil.example:80", 403),
            ("/", "127.0.0.1.evil.example", 403),
            ("/", "localhost", 200),
            ("/../config.py", None, 404),
            ("/status.json?x=1", None, 200),
        ]:
            status, _ = await asyncio.to_thread(get, port, path, host)
            assert status == expected, (path, host)


def background(page: Browser) -> str:
    return str(page.value("getComputedStyle(document.body).backgroundColor"))


async def test_the_page_in_a_browser(tmp_path: Path) -> None:
    async with served() as (router, busy, port):
        await call(router)

        def look() -> None:
            with browser(tmp_path) as page:
                page.look(width=1200, height=700, dark=False)
                page.open(f"http://127.0.0.1:{port}/")
                row = f"document.querySelector('tr[data-address=\"{busy.address}\"]')"
                page.wait_for(f"{row} && {row}.innerText.includes('inline')")
                text = page.value(f"{row}.innerText")
                assert "75% of 16k tokens · 3 running" in text
                assert "25% of 6400 tokens · 5 running" in text
                assert NASTY in text
                assert "decided: inline" in text
                width = page.value(f"{row}.querySelector('.c-host').style.width")
                assert width == "25%"
                down = page.value("document.querySelector('.state.down').closest('tr').innerText")
                assert "127.0.0.1:1" in down
                assert page.value("document.querySelectorAll('svg path:not(.floor)').length") == 6
                polls = page.value("Number(document.body.dataset.polls)")
                page.wait_for(f"Number(document.body.dataset.polls) > {polls}")
                light = background(page)
                page.look(width=420, height=700, dark=True)
                assert background(page) != light
                assert page.value("document.documentElement.scrollWidth") <= 420
                assert page.value("document.title") == "NEO Serving"
                assert page.problems == []

        await asyncio.to_thread(look)
