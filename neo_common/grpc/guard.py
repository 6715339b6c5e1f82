"""Between grpc.aio and our handlers: who may call, error mapping, malformed requests, refusal while
draining."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from neo_common.errors import Reason, ServiceError
from neo_common.grpc import principal
from neo_common.grpc.auth import Access
from neo_common.grpc.malformed import bad_text_field

_log = logging.getLogger(__name__)

Context = Any
"""grpc.aio.ServicerContext; the published stubs lack half of it."""
Handler = Callable[[Any, Context], Any]


@dataclass(frozen=True)
class Malformed:
    """Stands for a request whose bytes are not its message: truncated, or text not UTF-8."""

    field: str | None
    """The text that is not UTF-8; None when something else is wrong."""

    def error(self) -> ServiceError:
        """What its sender is told."""
        if self.field is None:
            return ServiceError(Reason.INVALID_ARGUMENT, "the request's bytes cannot be decoded")
        return ServiceError(
            Reason.INVALID_ARGUMENT, f"{self.field} is not valid UTF-8", field=self.field
        )


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Every handler runs inside it.

    - `ServiceError` (anything with `to_status()`) becomes that status; any other exception becomes
      INTERNAL with an id that is in the log beside the traceback, and nothing else.
    - Bytes that do not parse end with INVALID_ARGUMENT instead of gRPC's own INTERNAL.
    - `access` says who calls and whether they may; handlers find them in
      `neo_common.grpc.principal`.
    - `live` counts the calls of `counted` methods; while `draining` is set, new ones of them end
      with UNAVAILABLE (reason DRAINING). `idle` is set whenever none is live.
    """

    def __init__(self, counted: Callable[[str], bool], access: Access) -> None:
        self._counted = counted
        self._access = access
        self.draining = False
        self.live = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._wrapped: dict[str, tuple[Any, Any]] = {}  # method -> its handler, and that in ours

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        method = details.method
        known, wrapped = self._wrapped.get(method, (None, None))
        if known is not handler:  # asked for each call, and the same for all but tests
            wrapped = self._wrap(method, handler)
            self._wrapped[method] = (handler, wrapped)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        if handler.response_streaming:
            stream = handler.stream_stream if handler.request_streaming else handler.unary_stream
            wrap: Any = grpc.unary_stream_rpc_method_handler
            if handler.request_streaming:
                wrap = grpc.stream_stream_rpc_method_handler
            behaviour: Handler = self._streaming(method, stream)
        else:
            unary = handler.stream_unary if handler.request_streaming else handler.unary_unary
            wrap = grpc.unary_unary_rpc_method_handler
            if handler.request_streaming:
                wrap = grpc.stream_unary_rpc_method_handler
            behaviour = self._unary(method, unary)
        parse = handler.request_deserializer
        return wrap(behaviour, parse and _lenient(parse), handler.response_serializer)

    def _unary(self, method: str, inner: Handler) -> Handler:
        async def call(request: Any, context: Context) -> Any:
            self._enter(method)
            try:
                await self._check(method, request, context)
                return await inner(request, context)
            except Exception as error:
                await _answer(method, error, context)
            finally:
                self._leave(method)

        return call

    def _streaming(self, method: str, inner: Handler) -> Handler:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            self._enter(method)
            try:
                await self._check(method, request, context)
                produced = inner(request, context)
                if hasattr(produced, "__aiter__"):
                    async for message in produced:
                        yield message
                else:
                    await produced  # a handler that writes to the context itself
            except Exception as error:
                await _answer(method, error, context)
            finally:
                self._leave(method)

        return call

    async def _check(self, method: str, request: Any, context: Context) -> None:
        principal.enter(await self._access.admit(method, context))
        if isinstance(request, Malformed):
            raise request.error()
        if self._counted(method):
            self._refuse_while_draining()

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise ServiceError(Reason.DRAINING, "this server is shutting down", retry_after=1.0)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """One request on a stream of many: it counts like a call, while the stream itself, which a
        client may keep open for ever, does not. Raises ServiceError while draining."""
        self._refuse_while_draining()
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _enter(self, method: str) -> None:
        if self._counted(method):
            self._count(1)

    def _leave(self, method: str) -> None:
        if self._counted(method):
            self._count(-1)

    def _count(self, change: int) -> None:
        self.live += change
        if self.live == 0:
            self.idle.set()
        else:
            self.idle.clear()


def _lenient(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def call(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:  # protobuf's DecodeError, or UnicodeDecodeError from its Python backend
            # Generated stubs pass a message class's own method.
            message = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
            return Malformed(None if message is None else bad_text_field(message, data))

    return call


async def _answer(method: str, error: Exception, context: Context) -> None:
    if isinstance(error, grpc.aio.AbortError):  # the handler has answered already
        raise error
    with contextlib.suppress(grpc.aio.InternalError):
        if not isinstance(error, grpc.aio.InternalError):
            await _tell(method, error, context)
    # What we had to say could not be sent: the client is gone, whether gRPC has told us or not.
    raise asyncio.CancelledError


async def _tell(method: str, error: Exception, context: Context) -> None:
    to_status = getattr(error, "to_status", None)
    if to_status is not None:
        await context.abort_with_status(to_status())
    if isinstance(error, grpc.aio.BaseError | grpc.aio.UsageError) and context.cancelled():
        raise error  # the client is gone; there is nobody to tell
    ticket = uuid.uuid4().hex[:12]
    _log.error("%s failed, ticket %s", method, ticket, exc_info=error)
    await context.abort_with_status(
        ServiceError(Reason.INTERNAL_ERROR, f"internal error, ticket {ticket}").to_status()
    )
