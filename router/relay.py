"""One attempt of a call on one backend, as raw bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import grpc.aio

from neo_common.errors import NO_CALLS_NOW, SERVICE_FAULTS, reason_of
from neo_common.grpc.auth import HEADER
from neo_common.grpc.principal import TENANT_KEY, current
from neo_common.tracing import TRACEPARENT, current_traceparent

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the published stubs lack it

Context = grpc.aio.ServicerContext[bytes, bytes]
Metadata = tuple[tuple[str, str | bytes], ...]

DETAILS_KEY = "grpc-status-details-bin"
"""Carries google.rpc.Status, so ErrorInfo, RetryInfo and BadRequest."""
HOP_PREFIXES = ("grpc-", ":")
HOP_KEYS = frozenset({"user-agent", "te", "content-type", "content-length", "accept-encoding"})


def forwarded(metadata: Any) -> Metadata:
    """The part of `metadata` that belongs to the two peers, not to one hop of the way."""
    return tuple(
        (key, value)
        for key, value in (metadata or ())
        if key == DETAILS_KEY or (key not in HOP_KEYS and not key.startswith(HOP_PREFIXES))
    )


def outgoing(metadata: Any) -> Metadata:
    """What a backend is sent of a client's metadata, and whose call it is. The client's credentials
    are for the router alone."""
    tenant, traceparent = current().tenant, current_traceparent()
    ours = {HEADER, TENANT_KEY, TRACEPARENT} if traceparent else {HEADER, TENANT_KEY}
    passed = tuple((key, value) for key, value in forwarded(metadata) if key not in ours)
    if traceparent:
        passed = (*passed, (TRACEPARENT, traceparent))
    return (*passed, (TENANT_KEY, tenant)) if tenant else passed


@dataclass(frozen=True)
class Failure:
    """A status other than OK, as the backend (or the way to it) gave it."""

    code: grpc.StatusCode
    details: str
    trailing: Metadata

    @property
    def unreachable(self) -> bool:
        """Whether the way to the backend failed, rather than the backend refusing: a service of
        ours says why in the status details, a broken connection cannot."""
        return self.code is grpc.StatusCode.UNAVAILABLE and all(
            key != DETAILS_KEY for key, _ in self.trailing
        )

    @property
    def reason(self) -> str:
        """Of neo_common.errors; "" where the status has no details."""
        for key, value in self.trailing:
            if key == DETAILS_KEY and isinstance(value, bytes):
                return reason_of(value)
        return ""

    @property
    def declined(self) -> bool:
        """Whether the backend takes no calls for the moment."""
        return self.code is grpc.StatusCode.UNAVAILABLE and self.reason in NO_CALLS_NOW

    @property
    def is_the_backends(self) -> bool:
        """Whether the backend is at fault, and not the call or the way."""
        if self.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            return self.reason in ("", *SERVICE_FAULTS)
        return self.code is grpc.StatusCode.DATA_LOSS or self.reason in SERVICE_FAULTS

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> Failure:
        return cls.seen(error.code(), error.details() or "", forwarded(error.trailing_metadata()))

    @classmethod
    def seen(cls, code: grpc.StatusCode, details: str, trailing: Metadata) -> Failure:
        """Of a call that nobody here has cancelled. A server that stops cancels what it has left,
        and does not say why: its caller could do nothing with that."""
        if code is grpc.StatusCode.CANCELLED and all(key != DETAILS_KEY for key, _ in trailing):
            code = grpc.StatusCode.UNAVAILABLE
        return cls(code, details, trailing)

    async def refuse(self, context: Context) -> NoReturn:
        """End our own call in the same way."""
        await context.abort(self.code, self.details, self.trailing)
        raise AssertionError("abort returned")


Send = Callable[[bytes], Awaitable[None]]


class Attempt:
    """One attempt of a call on one backend: `first`, then `rest`; `end` it in any case.

    Cancelling `first` or `rest` cancels the backend's call, and so does `end`.
    """

    def __init__(
        self, channel: Any, path: str, request: bytes, context: Context, *, unary: bool = False
    ) -> None:
        """Send `request` to `path` with what is left of the client's time. unary: the answer is one
        message; a call that says so takes one step of gRPC's instead of four."""
        self._context = context
        self._unary = unary
        self._call: Any = (channel.unary_unary if unary else channel.unary_stream)(path)(
            request,
            timeout=context.time_remaining(),
            metadata=outgoing(context.invocation_metadata()),
        )
        self._message: Any = EOF

    async def first(self) -> Failure | None:
        """Wait until the answer begins (or ends without a message, well); nothing is passed on yet,
        so that the call can still be tried elsewhere."""
        try:
            self._message = await (self._call if self._unary else self._call.read())
            return None
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            return await self._failure(error)

    async def rest(self, send: Send) -> Failure | None:
        """Pass on each message to `send`, and metadata to the client; None when it ended well."""
        try:
            if self._message is not EOF and (
                initial := forwarded(await self._call.initial_metadata())
            ):
                await self._context.send_initial_metadata(initial)
            while self._message is not EOF:
                await send(self._message)
                self._message = EOF if self._unary else await self._call.read()
            if trailing := forwarded(await self._call.trailing_metadata()):
                self._context.set_trailing_metadata(trailing)
            return None
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            return await self._failure(error)

    async def _failure(self, error: BaseException) -> Failure:
        if isinstance(error, grpc.aio.AioRpcError):
            return Failure.of(error)
        # Either our client has gone, or the backend ended the call with CANCELLED: grpc.aio raises
        # the same for both.
        task = asyncio.current_task()
        if (task is not None and task.cancelling()) or not self._call.done():
            raise error
        details = str(await self._call.details() or "")
        trailing = forwarded(await self._call.trailing_metadata())
        return Failure.seen(grpc.StatusCode.CANCELLED, details, trailing)

    def end(self) -> None:
        """Let go of the backend's call, whatever its state."""
        self._call.cancel()
