"""One HTTP request as the parts of a gRPC call that the services' own code looks at."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn, Protocol

import grpc
from aiohttp import web

from neo_common.grpc.principal import PRIORITY_KEY, TENANT_KEY
from neo_http.errors import CallFailed

SESSION_KEY = "x-neo-session-id"
"""Which calls belong together, for a router."""
PASSED_ON = (
    "authorization",
    TENANT_KEY,
    PRIORITY_KEY,
    SESSION_KEY,
    "traceparent",
    "tracestate",
    "baggage",
)
"""Headers that have a meaning as metadata."""

Metadata = tuple[tuple[str, str | bytes], ...]


class HttpCall:
    """Stands where a servicer's context would. `timeout` is set once the body has been read."""

    def __init__(self, request: web.BaseRequest) -> None:
        self._transport = request.transport
        self._deadline: float | None = None
        self._metadata: Metadata = tuple(
            (name, value)
            for name in PASSED_ON
            for value in request.headers.getall(name, ())
            if value.isascii() and value.isprintable()
        )

    def limit(self, seconds: float) -> None:
        """The answer is of no use after this long."""
        self._deadline = time.monotonic() + seconds

    def of_session(self, name: str) -> None:
        """Unless a header has named another one already."""
        if not any(key == SESSION_KEY for key, _ in self._metadata):
            digest = hashlib.sha256(name.encode()).hexdigest()  # metadata takes no other alphabets
            self._metadata = (*self._metadata, (SESSION_KEY, digest))

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    async def send_initial_metadata(self, metadata: Any) -> None:
        """HTTP has no place for it."""

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Nor for this."""

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Any = ()) -> NoReturn:
        """Raises CallFailed."""
        raise CallFailed(code, details, trailing)

    def auth_context(self) -> Mapping[str, list[bytes]]:
        """Names in the client's certificate, under gRPC's keys."""
        shown = self._transport and self._transport.get_extra_info("peercert")
        if not shown:
            return {}
        alternative = [value for _, value in shown.get("subjectAltName", ())]
        common = [
            value for part in shown.get("subject", ()) for key, value in part if key == "commonName"
        ]
        return {
            "x509_subject_alternative_name": [name.encode() for name in alternative],
            "x509_common_name": [name.encode() for name in common],
        }


class Inference(Protocol):
    """How the service that listens makes a call of neo.v1.InferenceService.

    method: such as "GenerateStream". send: gets each message of the answer, and is awaited, so that
    a slow reader slows down the call. Raises ServiceError or CallFailed. Cancelling ends the call.
    """

    async def __call__(
        self, method: str, request: bytes, call: HttpCall, send: Callable[[bytes], Awaitable[None]]
    ) -> None: ...
