"""A few pages over plain HTTP for operators and their tools, from a thread of their own.

with serve_pages({"/metrics": render}, port=9100, setting="metrics_port"): ...
"""

from __future__ import annotations

import re
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar

TIMEOUT_SECONDS = 10.0
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class Page:
    content_type: str
    body: bytes


Render = Callable[[str], Page]
"""Makes a page; told what the client accepts. Called in threads, one for each request."""


class _Server(socketserver.ThreadingTCPServer):
    # Not http.server's: that one asks DNS for its own name first.
    allow_reuse_address = True
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    timeout = TIMEOUT_SECONDS
    routes: ClassVar[Mapping[str, Render]]
    local: ClassVar[bool]

    def do_GET(self) -> None:
        if self.local and self._host() not in LOCAL_NAMES:
            # A page of somebody else's, whose name was made to point here, must read nothing.
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        render = self.routes.get(self.path.partition("?")[0])
        if render is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        page = render(self.headers.get("Accept", ""))
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

    do_HEAD = do_GET

    def _host(self) -> str:
        """What the client calls this machine, without the port."""
        return re.sub(r":\d+$", "", self.headers.get("Host", ""))

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""


@contextmanager
def serve_pages(
    routes: Mapping[str, Render], port: int, *, setting: str, address: str = "0.0.0.0"
) -> Iterator[None]:
    """Serve `routes` (path -> page) while the context is open; port 0 serves nothing. On a loopback
    address only browsers that were told to come here are answered.

    Raises ValueError naming the setting when the port cannot be used."""
    if port == 0:
        yield
        return
    local = address.startswith("127.")
    handler = type("Handler", (_Handler,), {"routes": routes, "local": local})
    try:
        server = _Server((address, port), handler)
    except OverflowError as error:
        raise ValueError(f"{setting} must be at most 65535, not {port}") from error
    except OSError as error:
        raise ValueError(f"{setting} {port} cannot be used: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, name=setting, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
