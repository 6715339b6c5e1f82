"""Server-sent events: `data: {...}`, a blank line, ...; at the end `data: [DONE]`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web

from neo_http.errors import Problem

DONE = b"[DONE]"
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would wait for more
}


class Events:
    """The answer to `request` as a stream. Nothing is sent before the first event, so that what
    fails before it is answered with a status of its own."""

    def __init__(self, request: web.Request, headers: dict[str, str]) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=_HEADERS | headers)

    @property
    def begun(self) -> bool:
        return self.response.prepared

    async def send(self, events: Sequence[bytes]) -> None:
        """Waits while the client is slow to read. Raises ConnectionError when it is gone."""
        if not self.response.prepared:
            await self.response.prepare(self._request)
        await self.response.write(b"".join(b"data: %b\n\n" % event for event in events))

    async def finish(self) -> web.StreamResponse:
        await self.send([DONE])
        await self.response.write_eof()
        return self.response

    async def fail(self, problem: Problem) -> web.StreamResponse:
        """After the first event there is no other place for an error. Without [DONE], nobody takes
        the answer for a whole one."""
        await self.send([msgspec.json.encode(problem.body())])
        await self.response.write_eof()
        return self.response
