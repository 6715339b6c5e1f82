"""A backend's silence is told from our own."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from router.load import heard


async def answer(there: asyncio.Future[str]) -> str:
    return await there


async def test_a_loop_that_was_held_up_hears_what_came_meanwhile() -> None:
    loop = asyncio.get_running_loop()
    there: asyncio.Future[str] = loop.create_future()
    waiting = asyncio.create_task(heard(answer(there), 0.2))
    await asyncio.sleep(0.01)
    came = threading.Timer(0.1, loop.call_soon_threadsafe, (there.set_result, "load"))
    came.start()
    time.sleep(0.6)  # noqa: ASYNC251 -- it is what holds the loop up
    came.join()
    assert await waiting == "load"


async def test_silence_is_noticed() -> None:
    there: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with pytest.raises(TimeoutError):
        await heard(answer(there), 0.05)
    assert there.cancelled()


async def test_a_failure_is_passed_on() -> None:
    there: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    there.set_exception(OSError("broken"))
    with pytest.raises(OSError, match="broken"):
        await heard(answer(there), 1.0)
