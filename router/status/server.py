"""Serves the status page on loopback: files as they are, and what they show as JSON."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources

from neo_common.pages import Page, Render, serve_pages
from neo_common.version import version
from router.backend import Backend
from router.status.fleet import Fleet
from router.status.recent import RecentCalls

ADDRESS = "127.0.0.1"
LOOK_SECONDS = 1.0
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
}


class StatusPage:
    """Looks at the fleet once a second, in the event loop; its page is served by threads, which
    read what the last look has left."""

    def __init__(
        self,
        backends: Callable[[], Sequence[Backend]],
        recent: RecentCalls,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backends = backends
        self._recent = recent
        self._clock = clock
        self._fleet = Fleet()
        self._page = Page("application/json", b"{}")

    async def run(self) -> None:
        """For as long as the router lives."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        data = self._fleet.look(self._backends(), self._recent.look(), self._clock())
        data |= {"version": version(), "time": time.time()}
        self._page = Page("application/json", json.dumps(data, allow_nan=False).encode())

    @contextmanager
    def serve(self, port: int) -> Iterator[None]:
        """While the context is open; 0 serves nothing. Raises ValueError."""
        routes: dict[str, Render] = {"/status.json": lambda accept: self._page}
        for path, (name, content_type) in FILES.items():
            body = resources.files("router.status").joinpath("page", name).read_bytes()
            routes[path] = _file(Page(content_type, body))
        with serve_pages(routes, port, setting="status_port", address=ADDRESS):
            yield


def _file(page: Page) -> Render:
    return lambda accept: page
