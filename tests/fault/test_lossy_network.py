"""A real network that loses packets, and then all of them: a client in a namespace of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from router.app import running
from router.config import RouterConfig
from tests.support.fake_backend import FakeBackend, fake_backends
from tests.support.lossy import HERE, Link, lossy_link, missing

REPO = Path(__file__).resolve().parents[2]
TOKENS = 100
STREAMS = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]


@asynccontextmanager
async def far_client(link: Link, backend: FakeBackend) -> AsyncIterator[asyncio.subprocess.Process]:
    """Has had the first message of each of its streams."""
    config = RouterConfig(listen=f"{HERE}:0", backends=(backend.address,))
    async with running(config) as router:
        while not router.registry.usable():  # noqa: ASYNC110 -- as soon as its load is known
            await asyncio.sleep(0.02)
        client = await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", link.name, sys.executable, "-m", "tests.support.remote",
            router.server.address, str(STREAMS), cwd=REPO, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert client.stdout is not None
        try:
            assert await asyncio.wait_for(client.stdout.readline(), 120) == b"begun\n"
            yield client
        finally:
            if client.returncode is None:
                client.kill()
            await client.wait()


async def test_lost_and_late_packets_change_no_answer() -> None:
    """Of all packets 5% are lost, and the others overtake each other."""
    with lossy_link(seed=3) as link:
        link.loss, link.delay = 0.05, 0.02
        async with (
            fake_backends(1, tokens=TOKENS, delay=0.02) as (backend,),
            far_client(link, backend) as client,
        ):
            said, _ = await asyncio.wait_for(client.communicate(), 300)
        assert json.loads(said) == ["".join(f"a{n} " for n in range(TOKENS))] * STREAMS
        assert link.dropped > 10


async def test_a_cut_is_found_at_both_ends() -> None:
    """No packet passes any more, and no FIN: the server frees what the client held, and the client
    learns of it, each within a minute."""
    with lossy_link(seed=4) as link:
        async with fake_backends(1) as (backend,):
            backend.hold = asyncio.Event()
            async with far_client(link, backend) as client:
                link.cut, began = True, time.monotonic()
                async with asyncio.timeout(120):
                    while backend.live:  # noqa: ASYNC110 -- no event tells of the last one
                        await asyncio.sleep(0.05)
                found = time.monotonic() - began
                said, _ = await asyncio.wait_for(client.communicate(), 120)
        ends = json.loads(said)
        assert {status for status, _ in ends} == {"UNAVAILABLE"}
        print(f"server {found:.1f} s, client {max(seconds for _, seconds in ends):.1f} s")
        assert found < 60
        assert max(seconds for _, seconds in ends) < 65
