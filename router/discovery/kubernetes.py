"""Follows a Service's EndpointSlices: a list, then a watch from where the list ended.

    list ──> addresses ──> watch from its resourceVersion ──> each event ──> addresses
     ^                        │ the connection ends: watch again from the newest version
     └── after a pause ───────┴ 410 Gone, or any other error: list again

Until the first list succeeds there are no addresses; after that a failing API server changes
nothing, whereas an empty list does: the Service has no ready pods.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from router.discovery.endpoints import Slices
from router.discovery.targets import KubernetesTarget

log = logging.getLogger("router.discovery")

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
WATCH_SECONDS = 300
"""After which the API server ends a watch, so that a dead connection does not go unnoticed."""
LIST_SECONDS = 30.0
PAGE = 500
MAX_LINE = 16 << 20
"""Of one event."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
TROUBLE = (
    aiohttp.ClientError, OSError, TimeoutError,
    ValueError, LookupError, TypeError, AttributeError,  # answers that are not what they should be
)  # fmt: skip


@dataclass(frozen=True)
class ApiServer:
    """How to reach it. The token is read anew for each request: the kubelet renews it."""

    url: str
    account: Path = SERVICE_ACCOUNT
    """Folder with `token`, `ca.crt` and `namespace`; each may be missing."""

    @classmethod
    def of(cls, url: str, account: str) -> ApiServer:
        """url: "" means the one of the cluster that this process runs in. Raises ValueError."""
        if not url:
            host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
            port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
            if not host:
                raise ValueError(
                    "backends: k8s:/// needs kubernetes_api, or to run within a cluster "
                    "(KUBERNETES_SERVICE_HOST is not set)"
                )
            url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        return cls(url.rstrip("/"), Path(account))

    def namespace(self) -> str:
        return self._read("namespace") or "default"

    def headers(self) -> dict[str, str]:
        token = self._read("token")
        return {"Authorization": f"Bearer {token}"} if token else {}

    def tls(self) -> ssl.SSLContext:
        authority = self.account / "ca.crt"
        return ssl.create_default_context(cafile=str(authority) if authority.exists() else None)

    def _read(self, name: str) -> str:
        try:
            return (self.account / name).read_text().strip()
        except OSError:
            return ""


class GoneError(Exception):
    """The version to watch from is too old."""


async def follow(
    target: KubernetesTarget, api: ApiServer, found: Callable[[frozenset[str]], None]
) -> None:
    """Tell `found` the addresses whenever they may have changed, until cancelled."""
    watcher = _Watcher(target, api, found)
    pause = FIRST_PAUSE
    while True:
        try:
            async with aiohttp.ClientSession(read_bufsize=MAX_LINE) as session:
                version = await watcher.list(session)
                pause = FIRST_PAUSE
                while True:
                    version = await watcher.watch(session, version)
        except GoneError:
            continue  # the next list is up to date
        except TROUBLE as error:
            log.warning("cannot follow %s: %s", watcher.name, error or type(error).__name__)
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE)


class _Watcher:
    def __init__(
        self,
        target: KubernetesTarget,
        api: ApiServer,
        found: Callable[[frozenset[str]], None],
    ) -> None:
        namespace = target.namespace or api.namespace()
        self.name = f"{namespace}/{target.service}"
        self._url = f"{api.url}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._selector = f"kubernetes.io/service-name={target.service}"
        self._api = api
        self._tls = api.tls()
        self._slices = Slices(target)
        self._found = found

    async def list(self, session: aiohttp.ClientSession) -> str:
        """Returns the version to watch from."""
        items: list[Any] = []
        more = ""
        while True:
            query = {"labelSelector": self._selector, "limit": str(PAGE)}
            if more:
                query["continue"] = more
            limit = aiohttp.ClientTimeout(total=LIST_SECONDS)
            async with self._get(session, query, limit) as response:
                page = await response.json(content_type=None)
            items += page.get("items") or ()
            metadata = page.get("metadata") or {}
            more = metadata.get("continue") or ""
            if not more:
                self._slices.replace(items)
                self._found(self._slices.addresses)
                return str(metadata.get("resourceVersion") or "")

    async def watch(self, session: aiohttp.ClientSession, version: str) -> str:
        """Follow events until the server ends the watch; returns the newest version."""
        query = {
            "labelSelector": self._selector, "watch": "true", "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS), "resourceVersion": version,
        }  # fmt: skip
        limit = aiohttp.ClientTimeout(sock_connect=LIST_SECONDS, sock_read=WATCH_SECONDS + 30)
        async for event in self._events(session, query, limit):
            kind, item = event["type"], event["object"]
            if kind == "ERROR":
                if item.get("code") == 410:
                    raise GoneError
                raise ValueError(f"the API server says {item.get('message')!r}")
            version = str((item.get("metadata") or {}).get("resourceVersion") or version)
            if kind == "BOOKMARK":
                continue
            if kind == "DELETED":
                self._slices.drop(item)
            else:
                self._slices.put(item)
            self._found(self._slices.addresses)
        return version

    async def _events(
        self, session: aiohttp.ClientSession, query: dict[str, str], limit: aiohttp.ClientTimeout
    ) -> AsyncIterator[Any]:
        began = asyncio.get_running_loop().time()
        async with self._get(session, query, limit) as response:
            async for line in response.content:
                if line.strip():
                    yield json.loads(line)
        if asyncio.get_running_loop().time() - began < FIRST_PAUSE:
            # A server (or a proxy) that ends every watch at once must not be asked in a loop.
            await asyncio.sleep(FIRST_PAUSE)

    def _get(
        self, session: aiohttp.ClientSession, query: dict[str, str], limit: aiohttp.ClientTimeout
    ) -> _Answer:
        return _Answer(
            session.get(
                self._url, params=query, headers=self._api.headers(), ssl=self._tls, timeout=limit
            )
        )


class _Answer:
    """An answer that is not an error."""

    def __init__(self, request: Any) -> None:
        self._request = request

    async def __aenter__(self) -> aiohttp.ClientResponse:
        response: aiohttp.ClientResponse = await self._request.__aenter__()
        if response.status == 410:
            await self.__aexit__(None, None, None)
            raise GoneError
        if response.status != 200:
            await self.__aexit__(None, None, None)
            raise ValueError(f"the API server answers {response.status} {response.reason}")
        return response

    async def __aexit__(self, *error: Any) -> None:
        await self._request.__aexit__(*error)
